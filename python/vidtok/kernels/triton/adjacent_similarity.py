"""adjacent_similarity in Triton: products of raw values, scaled by fp32 norms, rounded to the grid of the dtype.

``previous``: a program walks RUN frames of one slot. Where a row fits into BLOCK it holds the frame before in
registers, so that a row is read (RUN + 1)/RUN times; longer rows are read once from memory and once from the L2
cache. ``window``: a program owns one slot of one segment and reads each row once; only rows beyond LONGEST need
a first launch for their norms. ``center``: a program per token. BLOCK and num_warps cut the sums: both depend on the
dtype, the channels and the SM only. RUN changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE
from vidtok.kernels.reference._numerics import bounds
from vidtok.kernels.reference.adjacent_similarity import MODES, window_slots
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    ceil_div,
    inverse_norm,
    power_of_2,
    round_cosine,
)

_PREVIOUS, _WINDOW, _CENTER = (MODES.index(mode) for mode in ("previous", "window", "center"))

# The longest row that ``window`` holds in registers.
LONGEST = 8192
# Programs below which runs are cut shorter, so that every SM has work.
PROGRAMS = 4096
LONGEST_RUN = 8

# Numbers of a video or segment in the table: first token, frames, slots, first program.
FIELDS = tl.constexpr(4)
FIRST = tl.constexpr(3)


@triton.jit
def _place(table, last, key, STRIDE: tl.constexpr, FIELD: tl.constexpr, STEPS: tl.constexpr):
    """The last of rows 0 to ``last`` of a table whose FIELD is at most ``key``, by halving."""
    low = tl.zeros((), tl.int64)
    high = low + last
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        above = tl.load(table + middle * STRIDE + FIELD).to(tl.int64) <= key
        low = tl.where(above, middle, low)
        high = tl.where(above, high, middle - 1)
        high = tl.where(high < low, low, high)
    return low


@triton.jit
def _row(at, start, channels, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    return tl.load(at + column, mask=column < channels * VECTOR, other=0.0).to(tl.float32)


@triton.jit
def _cosine(a, b, channels, STEPS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Rounded cosine of two rows, block by block."""
    products = tl.zeros((BLOCK,), tl.float32)
    squares_a = tl.zeros((BLOCK,), tl.float32)
    squares_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels * VECTOR, BLOCK):
        u = _row(a, start, channels, VECTOR, BLOCK)
        v = _row(b, start, channels, VECTOR, BLOCK)
        products += u * v
        squares_a += u * u
        squares_b += v * v
    dot = tl.sum(products, axis=0)
    cosine = dot * inverse_norm(tl.sum(squares_a, axis=0)) * inverse_norm(tl.sum(squares_b, axis=0))
    return round_cosine(cosine, STEPS)


# Numbers are not specialised, so that a kernel serves every shape.
@triton.jit(do_not_specialize=["videos", "channels", "x_stride"])
def _previous(
    x, out, table, videos, channels, x_stride, STEPS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    RUN: tl.constexpr, WHOLE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Cosines of RUN frames of one slot with the frames before them."""
    program = tl.program_id(0).to(tl.int64)
    v = table + _place(table, videos - 1, program, FIELDS, FIRST, SEARCH) * FIELDS
    frames = tl.load(v + 1)
    slots = tl.load(v + 2)
    here = program - tl.load(v + 3)
    begin = here // slots * RUN
    end = tl.minimum(begin + RUN, frames)
    token = tl.load(v) + begin * slots + here % slots
    stride = x_stride.to(tl.int64) * VECTOR
    if WHOLE:
        before = tl.zeros((BLOCK,), tl.float32)
        if begin > 0:
            before = _row(x + (token - slots) * stride, 0, channels, VECTOR, BLOCK)
        inverse_before = inverse_norm(tl.sum(before * before, axis=0))
        for t in range(begin, end):
            row = _row(x + token * stride, 0, channels, VECTOR, BLOCK)
            inverse = inverse_norm(tl.sum(row * row, axis=0))
            cosine = round_cosine(tl.sum(row * before, axis=0) * inverse * inverse_before, STEPS)
            tl.store(out + token, tl.where(t > 0, cosine, float("-inf")))
            before = row
            inverse_before = inverse
            token += slots
    else:
        for t in range(begin, end):
            if t > 0:
                a = x + token * stride
                tl.store(out + token, _cosine(a, a - slots * stride, channels, STEPS, VECTOR, BLOCK))
            else:
                tl.store(out + token, float("-inf"))
            token += slots


@triton.jit(do_not_specialize=["sequences", "channels", "x_stride"])
def _center(
    x, center, out, cu_seqlens, sequences, channels, x_stride,
    STEPS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Cosine of one token with the centre of its sequence."""
    token = tl.program_id(0).to(tl.int64)
    s = _place(cu_seqlens, sequences - 1, token, 1, 0, SEARCH)
    a = x + token * (x_stride.to(tl.int64) * VECTOR)
    b = center + s * (channels.to(tl.int64) * VECTOR)
    tl.store(out + token, _cosine(a, b, channels, STEPS, VECTOR, BLOCK))


@triton.jit(do_not_specialize=["channels", "x_stride"])
def _inverse(x, inverse, channels, x_stride, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """1/norm of one row."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels * VECTOR, BLOCK):
        row = _row(x + token * (x_stride.to(tl.int64) * VECTOR), start, channels, VECTOR, BLOCK)
        squares += row * row
    tl.store(inverse + token, inverse_norm(tl.sum(squares, axis=0)))


@triton.jit(do_not_specialize=["segments", "channels", "x_stride"])
def _window(
    x, out, inverse, table, segments, channels, x_stride, STEPS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Mean cosine over the pairs of frames of one slot of one segment."""
    program = tl.program_id(0).to(tl.int64)
    v = table + _place(table, segments - 1, program, FIELDS, FIRST, SEARCH) * FIELDS
    first = tl.load(v)
    frames = tl.load(v + 1)
    slots = tl.load(v + 2)
    token = first + program - tl.load(v + 3)
    stride = x_stride.to(tl.int64) * VECTOR
    if frames == 1:
        tl.store(out + program, float("-inf"))
    else:
        units = tl.zeros((), tl.float32)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, channels * VECTOR, BLOCK):
            total = tl.zeros((BLOCK,), tl.float32)
            for t in range(frames):
                row = _row(x + (token + t * slots) * stride, start, channels, VECTOR, BLOCK)
                if WHOLE:
                    scale = inverse_norm(tl.sum(row * row, axis=0))
                else:
                    scale = tl.load(inverse + token + t * slots)
                total += row * scale
                if start == 0:
                    units += tl.where(scale != 0.0, 1.0, 0.0)
            squares += total * total
        pairs = (frames * (frames - 1)).to(tl.float32)
        tl.store(out + program, round_cosine(tl.div_rn(tl.sum(squares, axis=0) - units, pairs), STEPS))


def _vector(*rows: Tensor) -> int:
    """Elements of the widest vector, up to 16 bytes, that the rows of all tensors consist of."""
    vector = 16 // rows[0].itemsize
    while any(t.shape[1] % vector or (t.shape[0] > 1 and t.stride(0) % vector) for t in rows):
        vector //= 2
    return vector


def _rows(grid: Tensor, total: int) -> list[list[int]]:
    out: list[list[int]] = grid.tolist()
    if sum(t * h * w for t, h, w in out) != total:
        raise IndexError(f"expected grids that hold {total} tokens, got {out}")
    return out


def _segments(grid_rows: list[list[int]], windows: list[int]) -> list[int]:
    """The table of ``_window``."""
    table: list[int] = []
    token, program, segment = 0, 0, 0
    for t, h, w in grid_rows:
        covered = 0
        while covered < t:
            frames = windows[segment]
            table += (token, frames, h * w, program)
            token += frames * h * w
            program += h * w
            covered += frames
            segment += 1
    return table


def _occupied(table: list[int], size: int) -> list[int]:
    """The table without the rows that hold no slots: they would hide others from the search."""
    return [n for i in range(0, len(table), size) if table[i + 2] for n in table[i : i + size]]


def adjacent_similarity(
    x: Tensor,
    grid: Tensor,
    mode: int,
    window: Tensor | None,
    center: Tensor | None,
    cu_seqlens: Tensor | None,
    num_out: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.adjacent_similarity.adjacent_similarity`."""
    if x.dtype not in DTYPE_CODE:
        return NotImplemented
    n, c = x.shape
    below_2_31(n, "tokens")
    if len(grid.shape) != 2 or grid.shape[1] != 3:
        raise IndexError(f"expected grid of shape [V, 3], got {list(grid.shape)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = _rows(grid, n) if mode != _CENTER else []
    table: list[int] = []
    windows: list[int] = []
    if mode == _WINDOW:
        assert window is not None
        windows = window.tolist()
        num_out = window_slots(rows, windows, n)
    else:
        num_out = n
    out = x.new_empty(num_out, dtype=torch.float32)
    if num_out == 0:
        return out
    knobs = _common.choice("adjacent_similarity", x, {"tokens": n, "channels": c})
    block, warps = min(knobs["block"], power_of_2(c, 16)), knobs["num_warps"]
    steps = _common.cosine_steps(x.dtype)
    with _common.on_device(x):
        if mode == _CENTER:
            _centers(x, out, center, cu_seqlens, steps, block, warps)
            return out
        vector = _vector(x)
        sizes = (c // vector, x.stride(0) // vector)
        if mode == _PREVIOUS:
            run = power_of_2(n // PROGRAMS, 1, LONGEST_RUN)
            token, program = 0, 0
            for t, h, w in rows:
                table += (token, t, h * w, program)
                token += t * h * w
                program += ceil_div(t, run) * h * w
            table = _occupied(table, FIELDS.value)
            videos = len(table) // FIELDS.value
            _previous[(program,)](
                x, out, _common.device_list(table, x), videos, *sizes, STEPS=steps, VECTOR=vector, BLOCK=block,
                RUN=run, WHOLE=block >= c, SEARCH=videos.bit_length(), num_warps=warps, **LAUNCH,
            )  # fmt: skip
            return out
        table = _occupied(_segments(rows, windows), FIELDS.value)
        whole = c <= LONGEST
        inverse = out if whole else x.new_empty(n, dtype=torch.float32)
        if whole:
            block = power_of_2(c, 16)
            warps = max(warps, min(16, block // 512))
        else:
            _inverse[(n,)](x, inverse, *sizes, VECTOR=vector, BLOCK=block, num_warps=warps, **LAUNCH)
        segments = len(table) // FIELDS.value
        _window[(num_out,)](
            x, out, inverse, _common.device_list(table, x), segments, *sizes, STEPS=steps, VECTOR=vector,
            BLOCK=block, WHOLE=whole, SEARCH=segments.bit_length(), num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return out


def _centers(
    x: Tensor, out: Tensor, center: Tensor | None, cu_seqlens: Tensor | None, steps: float, block: int, warps: int
) -> None:
    """Launch ``_center``."""
    assert center is not None and cu_seqlens is not None
    sequences, c = cu_seqlens.shape[0] - 1, x.shape[1]
    if center.dtype is not x.dtype or list(center.shape) != [sequences, c] or sequences < 1:
        raise IndexError(f"expected center of shape [{sequences}, {c}], got {list(center.shape)}")
    if cu_seqlens.device != x.device or not x.is_cuda:
        cu = bounds(cu_seqlens, x.shape[0])
        cu_seqlens = _common.device_list([0, *(b for _, b in cu)], x, torch.int32)
    vector = _vector(x, center)
    _center[(x.shape[0],)](
        x, center.contiguous(), out, cu_seqlens, sequences, c // vector, x.stride(0) // vector,
        STEPS=steps, VECTOR=vector, BLOCK=block, SEARCH=sequences.bit_length(), num_warps=warps, **LAUNCH,
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """Representative compilations."""
    out = []
    for dtype, pointer in POINTER.items():
        name, sizes = pointer[1:], {"channels": "i32", "x_stride": "i32"}
        shape = {"STEPS": _common.cosine_steps(dtype), "VECTOR": 16 // dtype.itemsize, "BLOCK": 1024}
        signature = {"x": pointer, "out": "*fp32", "table": "*i64", "videos": "i32", **sizes}
        for whole in (True, False):
            held = {**shape, "BLOCK": 4096 if whole else 1024, "RUN": 8, "WHOLE": whole, "SEARCH": 3}
            out.append(Specimen(f"previous {'held' if whole else 'long'} {name}", _previous, signature, held))
        signature = {"x": pointer, "center": pointer, "out": "*fp32", "cu_seqlens": "*i32", "sequences": "i32", **sizes}
        out.append(Specimen(f"center {name}", _center, signature, {**shape, "SEARCH": 3}))
        signature = {"x": pointer, "inverse": "*fp32", **sizes}
        norms = {"VECTOR": shape["VECTOR"], "BLOCK": 1024}
        out.append(Specimen(f"norms {name}", _inverse, signature, norms))
        signature = {"x": pointer, "out": "*fp32", "inverse": "*fp32", "table": "*i64", "segments": "i32", **sizes}
        for whole in (True, False):
            held = {**shape, "BLOCK": 8192 if whole else 1024, "WHOLE": whole, "SEARCH": 3}
            out.append(
                Specimen(f"window {'held' if whole else 'long'} {name}", _window, signature, held, 16 if whole else 4)
            )
    return out
