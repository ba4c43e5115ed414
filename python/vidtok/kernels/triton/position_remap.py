"""position_remap in Triton: every rider in one launch.

Addresses and sizes of the riders go in as kernel arguments, which a captured graph holds by value; a range of
programs belongs to each rider. Entries move as whole units of 1 to 16 bytes, whatever their type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.native.position_remap import _bits
from vidtok.kernels.reference.position_remap import result_shape
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import LAUNCH, Specimen, below_2_31, ceil_div, code_of, power_of_2, report_any

ANCHOR = tl.constexpr(code_of("position_remap", "anchor"))

# Riders of one launch; more go in further launches.
RIDERS = 8


@triton.jit
def _move(
    source, target, anchor, n, m, inner, fill, block, error,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block number ``block`` of one rider: ROWS anchors by WIDTH lanes of one outer slice."""
    # 16 bytes are two lanes side by side, which the compiler joins into one access.
    LANES: tl.constexpr = 2 if UNIT == 16 else 1
    LANE: tl.constexpr = tl.int8 if UNIT == 1 else tl.int16 if UNIT == 2 else tl.int32 if UNIT == 4 else tl.int64
    source = tl.multiple_of(source.to(tl.pointer_type(LANE), bitcast=True), UNIT)
    target = tl.multiple_of(target.to(tl.pointer_type(LANE), bitcast=True), UNIT)
    lanes = inner * LANES
    across = (lanes + WIDTH - 1) // WIDTH
    down = (m + ROWS - 1) // ROWS
    part = block % across
    rest = block // across
    outer = rest // down
    row = (rest % down) * ROWS + tl.arange(0, ROWS)
    here = row < m
    index = tl.load(anchor + row, mask=here, other=-1).to(tl.int64)
    known = (index >= 0) & (index < n)
    if (outer == 0) & (part == 0):
        report_any(error, ANCHOR, index, tl.full((), -1, tl.int64), n, (index < -1) | (index >= n))
    column = part * WIDTH + tl.arange(0, WIDTH)
    inside = (column < lanes)[None, :]
    at = source + ((outer * n + index) * lanes)[:, None] + column[None, :]
    value = tl.load(at, mask=known[:, None] & inside, other=0)
    # Bad indices give zeros, like any other output of theirs.
    pad = tl.where(index == -1, fill, 0).to(LANE)
    value = tl.where(known[:, None], value, pad[:, None])
    tl.store(target + ((outer * m + row) * lanes)[:, None] + column[None, :], value, mask=here[:, None] & inside)


NUMBERS = ("source", "target", "inner", "fill", "stop")


# Numbers are not specialised, so that a kernel serves every shape; those of a tuple would be.
@triton.jit(do_not_specialize=["n", "m", *(f"{name}{i}" for name in NUMBERS for i in range(RIDERS))])
def _remap(
    anchor, n, m, error,
    source0, source1, source2, source3, source4, source5, source6, source7,
    target0, target1, target2, target3, target4, target5, target6, target7,
    inner0, inner1, inner2, inner3, inner4, inner5, inner6, inner7,
    fill0, fill1, fill2, fill3, fill4, fill5, fill6, fill7,
    stop0, stop1, stop2, stop3, stop4, stop5, stop6, stop7,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Programs below ``stop[i]`` and not below ``stop[i - 1]`` belong to rider i of COUNT."""
    source = (source0, source1, source2, source3, source4, source5, source6, source7)
    target = (target0, target1, target2, target3, target4, target5, target6, target7)
    inner = (inner0, inner1, inner2, inner3, inner4, inner5, inner6, inner7)
    fill = (fill0, fill1, fill2, fill3, fill4, fill5, fill6, fill7)
    stop = (stop0, stop1, stop2, stop3, stop4, stop5, stop6, stop7)
    program = tl.program_id(0).to(tl.int64)
    n = n.to(tl.int64)
    m = m.to(tl.int64)
    begin = program * 0
    for i in tl.static_range(COUNT):
        end = stop[i].to(tl.int64)
        if (program >= begin) & (program < end):
            _move(
                source[i].to(tl.int64), target[i].to(tl.int64), anchor, n, m, inner[i].to(tl.int64),
                fill[i].to(tl.int64), program - begin, error, UNIT[i], WIDTH[i], ROWS[i],
            )  # fmt: skip
        begin = end


def _repeated(bits: int, size: int) -> int:
    """The bytes of an element over and over, as a signed number of 8 bytes."""
    pattern = (bits & ((1 << (8 * size)) - 1)).to_bytes(size, "little") * (8 // size)
    return int.from_bytes(pattern, "little", signed=True)


def position_remap(
    anchor: Tensor, tensors: list[Tensor], dims: list[int], dense: list[int], length: int, fill: list[float]
) -> Any:
    """See :func:`vidtok.kernels.reference.position_remap.position_remap`."""
    if anchor.dtype is not torch.int32:
        return NotImplemented
    m = anchor.shape[0]
    below_2_31(m, "anchors")
    out: list[Tensor] = []
    moves: list[tuple[int, int, int, int, int, int]] = []
    n = -1
    for t, dim, batch, value in zip(tensors, dims, dense, fill):
        size, shape = t.itemsize, t.shape
        if size > 8:
            return NotImplemented
        first = dim - batch
        held = shape[first] * shape[dim] if batch else shape[dim]
        outer, inner = math.prod(shape[:first]), math.prod(shape[dim + 1 :]) * size
        y = t.new_empty(result_shape(shape, dim, batch, m, length))
        if held != n >= 0 or (batch and shape[dim - 1] * length != m):
            raise ValueError(f"expected {n} tokens that become {m}, got shape {list(shape)} to {list(y.shape)}")
        n = held
        below_2_31(n, "tokens")
        out.append(y)
        if y.numel():
            unit = 16
            while (inner | t.data_ptr() | y.data_ptr()) % unit:
                unit //= 2
            bits = _repeated(_bits(t.dtype, value), size) if value else 0
            moves.append((t.data_ptr(), y.data_ptr(), outer, inner // unit, unit, bits))
    if not moves:
        return out
    x = tensors[0]
    error = _common.error_words(x)
    with _common.on_device(x):
        for at in range(0, len(moves), RIDERS):
            _launch(anchor, n, m, moves[at : at + RIDERS], error, x)
    _common.check(x)
    return out


def _launch(
    anchor: Tensor, n: int, m: int, moves: list[tuple[int, int, int, int, int, int]], error: Tensor, x: Tensor
) -> None:
    """One launch for up to RIDERS riders."""
    widest = max(inner * unit for _, _, _, inner, unit, _ in moves)
    knobs = _common.choice("position_remap", x, {"rows": m, "tensors": len(moves), "bytes": widest})
    stop, widths, rows, programs = [], [], [], 0
    for _, _, outer, inner, unit, _ in moves:
        lanes = inner * (2 if unit == 16 else 1)
        width = power_of_2(lanes, 1, knobs["block"])
        height = knobs["block"] // width
        programs += outer * ceil_div(m, height) * ceil_div(lanes, width)
        widths.append(width)
        rows.append(height)
        stop.append(programs)
    below_2_31(programs, "programs")
    sources, targets, _, inners, units, fills = zip(*moves)
    unused = (0,) * (RIDERS - len(moves))
    numbers = [v for column in (sources, targets, inners, fills, stop) for v in (*column, *unused)]
    _remap[(programs,)](
        anchor, n, m, error, *numbers, UNIT=units, WIDTH=tuple(widths), ROWS=tuple(rows), COUNT=len(moves),
        num_warps=knobs["num_warps"], **LAUNCH,
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """Representative compilations: ids, mask and labels; the same with hidden states."""
    out = []
    for name, units, widths in (
        ("ids", (8, 1, 8), (1, 1, 1)),
        ("ids and hidden states", (8, 1, 8, 16), (1, 1, 1, 256)),
    ):
        signature = {"anchor": "*i32", "n": "i32", "m": "i32", "error": "*i32"}
        for number in NUMBERS:
            wide = number in ("source", "target")
            signature |= {f"{number}{i}": "i64" if wide and i < len(units) else "i32" for i in range(RIDERS)}
        shape = {"UNIT": units, "WIDTH": widths, "ROWS": tuple(256 // w for w in widths), "COUNT": len(units)}
        out.append(Specimen(name, _remap, signature, shape))
    return out
