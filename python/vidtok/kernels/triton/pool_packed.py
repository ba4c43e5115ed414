"""pool_packed and its backward in Triton: every grid in one launch.

A program owns one row of the result by BLOCK channels and adds its members in the order of rows, then columns, in
fp32, so no knob changes bits. Where the grid stays as it is, the row is copied bit for bit. Forward members are the
tokens of the window; backward members are the windows that hold the token, each with its own area.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE
from vidtok.kernels.native.pool_packed import _grids
from vidtok.kernels.reference.pool_packed import _layout
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import LAUNCH, POINTER, Specimen, below_2_31, ceil_div, power_of_2
from vidtok.kernels.triton.plan_apply import _vector

# Numbers of a grid in the table: first token in, first token out, height and width in, height and width out.
FIELDS = tl.constexpr(6)


# Numbers are not specialised, so that a kernel serves every shape.
@triton.jit(do_not_specialize=["grids", "channels", "x_stride"])
def _pool(
    x, out, table, grids, channels, x_stride,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One row of the result; ``channels`` and ``x_stride`` count vectors of VECTOR elements."""
    row = tl.program_id(0).to(tl.int64)
    first: tl.constexpr = 0 if BACKWARD else 1
    # The last grid that begins at or before the row, by halving.
    v = tl.zeros((), tl.int64)
    span = v + grids
    for _ in tl.static_range(STEPS):
        half = span // 2
        above = tl.load(table + (v + half) * FIELDS + first) <= row
        v = tl.where(above, v + half, v)
        span = tl.where(above, span - half, half)
        span = tl.where(span < 1, 1, span)
    grid = table + v * FIELDS
    h = tl.load(grid + 2)
    w = tl.load(grid + 3)
    oh = tl.load(grid + 4)
    ow = tl.load(grid + 5)
    if BACKWARD:
        here = row - tl.load(grid)
        begin = tl.load(grid + 1)
        rows, cols, other_rows, other_cols = h, w, oh, ow
    else:
        here = row - tl.load(grid + 1)
        begin = tl.load(grid)
        rows, cols, other_rows, other_cols = oh, ow, h, w
    j = here % cols
    i = (here // cols) % rows
    t = here // (cols * rows)
    # Windows [⌊i·n/o⌋, ⌈(i+1)·n/o⌉); the windows that hold a place have the same form with n and o exchanged.
    top = i * other_rows // rows
    bottom = ((i + 1) * other_rows + rows - 1) // rows
    left = j * other_cols // cols
    right = ((j + 1) * other_cols + cols - 1) // cols
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels * VECTOR
    to = out + row * (channels.to(tl.int64) * VECTOR) + column
    stride = x_stride.to(tl.int64) * VECTOR
    frame = begin + t * other_rows * other_cols
    if (h == oh) & (w == ow):
        tl.store(to, tl.load(x + (frame + top * other_cols + left) * stride + column, mask=inside), mask=inside)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        width = right - left
        for k in range((bottom - top) * width):
            a = top + k // width
            b = left + k % width
            value = tl.load(x + (frame + a * other_cols + b) * stride + column, mask=inside, other=0.0).to(tl.float32)
            if BACKWARD:
                high = ((a + 1) * h + oh - 1) // oh - a * h // oh
                wide = ((b + 1) * w + ow - 1) // ow - b * w // ow
                value = tl.div_rn(value, (high * wide).to(tl.float32) + tl.zeros((BLOCK,), tl.float32))
            total += value
        if not BACKWARD:
            total = tl.div_rn(total, ((bottom - top) * width).to(tl.float32) + tl.zeros((BLOCK,), tl.float32))
        tl.store(to, total.to(out.dtype.element_ty), mask=inside)


def _launch(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int, num_out: int, backward: bool) -> Tensor:
    layout = _layout(grid_in, grid_out, num_in, num_out)
    c = x.shape[1]
    out = x.new_empty(num_in if backward else num_out, c)
    for what, count in (("tokens", num_in), ("pooled tokens", num_out)):
        below_2_31(count, what)
    if out.numel() == 0:
        return out
    if num_out == 0:  # grids whose sides are 0 hold no tokens, so there is nothing that a gradient could reach
        return out.zero_()
    table: list[int] = []
    start, start_out = 0, 0
    for (t, h, w), (_, oh, ow) in layout:
        table += (start, start_out, h, w, oh, ow)
        start += t * h * w
        start_out += t * oh * ow
    if x.stride(1) != 1:
        x = x.contiguous()
    shape = {"rows": out.shape[0], "channels": c, "itemsize": x.itemsize}
    knobs = _common.choice("pool_packed", x, shape)
    vector = _vector(x)
    block = power_of_2(c, 16, knobs["block"])
    with _common.on_device(x):
        _pool[(out.shape[0], ceil_div(c, block))](
            x, out, _common.device_list(table, x), len(layout), c // vector, x.stride(0) // vector,
            VECTOR=vector, BLOCK=block, STEPS=len(layout).bit_length(), BACKWARD=backward,
            num_warps=knobs["num_warps"], **LAUNCH,
        )  # fmt: skip
    return out


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed`."""
    if x.dtype not in DTYPE_CODE:
        return NotImplemented
    _grids(grid_in, grid_out)
    if num_out < 0:
        num_out = int(grid_out.prod(1).sum())
    return _launch(x, grid_in, grid_out, x.shape[0], num_out, backward=False)


def pool_packed_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed_backward`."""
    if grad.dtype not in DTYPE_CODE:
        return NotImplemented
    _grids(grid_in, grid_out)
    return _launch(grad, grid_in, grid_out, num_in, grad.shape[0], backward=True)


def specimens() -> list[Specimen]:
    """Representative compilations."""
    out = []
    for dtype, pointer in POINTER.items():
        signature = {"x": pointer, "out": pointer, "table": "*i64"}
        signature |= {"grids": "i32", "channels": "i32", "x_stride": "i32"}
        for name, backward in (("forward", False), ("backward", True)):
            shape = {"VECTOR": 16 // dtype.itemsize, "BLOCK": 1024, "STEPS": 4, "BACKWARD": backward}
            out.append(Specimen(f"{name} {pointer[1:]}", _pool, signature, shape))
    return out
