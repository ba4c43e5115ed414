"""CUDA pool_packed and its backward."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import Any

from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, Launch, check, device_list, extension, launch
from vidtok.kernels.native.pool_packed import _grids


@lru_cache(maxsize=1024)
def _layout(grid_in: tuple[int, ...], grid_out: tuple[int, ...], num_in: int, num_out: int) -> tuple[int, ...] | None:
    """(first token before, after, t, h, w, h', w') of each video with tokens; raises unless the grids fit.

    None for sides that the kernels leave to the reference.
    """
    flat: list[int] = []
    held = left = longest = 0
    for at in range(0, len(grid_in), 3):
        (t, h, w), (frames, oh, ow) = grid_in[at : at + 3], grid_out[at : at + 3]
        if min(t, h, w, oh, ow) < 0 or t != frames or oh > h or ow > w:
            break
        if t * h * w:
            flat += (held, left, t, h, w, oh, ow)
            held, left, longest = held + t * h * w, left + t * oh * ow, max(longest, h, w)
    else:
        if (held, left) == (num_in, num_out):
            return tuple(flat) if longest < 2**16 else None
    raise IndexError(
        f"expected grids over {num_in} and {num_out} tokens that pooling only shrinks, got "
        f"{grid_in[:12]} to {grid_out[:12]}"
    )


def _flat(grid: Tensor) -> tuple[int, ...]:
    return tuple(chain.from_iterable(grid.tolist()))


def _choice(x: Tensor, rows: int, on: Launch) -> tuple[int, int]:
    shape = {"rows": rows, "channels": x.shape[1], "itemsize": x.itemsize}
    knobs = tables.choose("cuda", "pool_packed", on.sm, DTYPE_NAME[x.dtype], shape)
    return knobs["threads"], knobs["vectors"]


def _call(name: str, x: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int, num_out: int, rows: int) -> Any:
    """One way or the other between ``num_in`` tokens of the unpooled grids and ``num_out``, to ``rows`` of them."""
    _check.below_2_31(num_in, "tokens")
    layout = _layout(_flat(grid_in), _flat(grid_out), num_in, num_out)
    if layout is None:
        return NotImplemented
    if x.stride(1) != 1:
        x = x.contiguous()
    c = x.shape[1]
    out = x.new_empty(rows, c)
    grids = device_list(layout, x)
    on = launch(x)
    status = getattr(extension(), name)(
        x.data_ptr(), out.data_ptr(), DTYPE_CODE[x.dtype], num_in, num_out, c, x.stride(0), grids.data_ptr(),
        len(layout) // 7, *_choice(x, rows, on), *on,
    )  # fmt: skip
    check(status, name, x)
    return out


def pool_packed(x: Tensor, grid_in: Tensor, grid_out: Tensor, num_out: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed`."""
    if x.dtype not in DTYPE_CODE:
        return NotImplemented
    _grids(grid_in, grid_out)
    if num_out < 0:
        num_out = int(grid_out.prod(1).sum())
    return _call("pool_packed", x, grid_in, grid_out, x.shape[0], num_out, num_out)


def pool_packed_backward(grad: Tensor, grid_in: Tensor, grid_out: Tensor, num_in: int) -> Any:
    """See :func:`vidtok.kernels.reference.pool_packed.pool_packed_backward`."""
    if grad.dtype not in DTYPE_CODE:
        return NotImplemented
    _grids(grid_in, grid_out)
    return _call("pool_packed_backward", grad, grid_in, grid_out, num_in, grad.shape[0], num_in)
