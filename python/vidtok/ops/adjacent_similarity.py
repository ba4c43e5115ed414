"""Cosine of tokens along time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import adjacent_similarity as native
from vidtok.kernels.reference import adjacent_similarity as reference
from vidtok.kernels.reference._numerics import accumulate_dtype
from vidtok.ops import _grid
from vidtok.ops._library import define, dynamic_size
from vidtok.plan import offsets


def _fake(
    x: Tensor,
    grid: Tensor,
    mode: int,
    window: Tensor | None,
    center: Tensor | None,
    cu_seqlens: Tensor | None,
    num_out: Any,
) -> Tensor:
    size = num_out if isinstance(num_out, torch.SymInt) or num_out >= 0 else dynamic_size()
    return x.new_empty(size, dtype=accumulate_dtype(x.dtype))


_op = define(
    "adjacent_similarity",
    "(Tensor x, Tensor grid, int mode, Tensor? window, Tensor? center, Tensor? cu_seqlens, SymInt num_out) -> Tensor",
    reference.adjacent_similarity,
    _fake,
    native.adjacent_similarity,
)


def _one_per_video(grid: Tensor, device: torch.device) -> Tensor:
    """Offsets of the videos, where ``x`` lies."""
    if not torch.compiler.is_compiling():
        return offsets([t * h * w for t, h, w in grid.tolist()], device)
    lengths = grid.prod(1)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)


def adjacent_similarity(
    x: Tensor,
    grid_thw: _grid.GridLike,
    *,
    to: Literal["previous", "window", "center"] = "previous",
    window: Tensor | Sequence[int] | None = None,
    center: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Cosine of each token with the same slot in other frames, or with a centre.

    With unit rows :math:`\hat x` (a zero row gives cosine 0), summed in fp32 and rounded to
    multiples of 2⁻²⁰ (2⁻¹⁶ for bf16 and fp16) so that equal tokens tie exactly:

    - ``previous``: :math:`\hat x_{t,l} \cdot \hat x_{t-1,l}`, −inf in first frames; ``[N]``.
    - ``window``: mean over all ordered pairs of different frames of the slot in the segment,
      :math:`(\|\sum_t \hat x_{t,l}\|^2 - w) / (w(w-1))`; −inf for one frame; ``[Σ h·w]`` per segment and slot.
    - ``center``: :math:`\hat x_i \cdot \hat c_s` with ``center[s]`` of the token's sequence; ``[N]``.

    Args:
        x: ``[N, C]`` packed tokens, frame after frame, row after row. fp32, bf16 or fp16. Detached.
        grid_thw: ``[V, 3]`` tokens per video as (frames, height, width).
        window: frames per segment; the segments of each video cover its frames in order.
        center: ``[S, C]`` in the dtype of ``x``.
        cu_seqlens: int32 ``[S+1]`` sequences of ``center``; one per video when None.

    Returns:
        fp32 scores of the shape above.

    Raises:
        ValueError: grids, windows or centres that do not fit ``x``.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.adjacent_similarity(torch.ones(4, 8), [(2, 1, 2)])
        tensor([-inf, -inf, 1., 1.])
    """
    _check.float_tensor(x, "x", "[N, C]")
    if to not in reference.MODES:
        _check.fail(f"to among {', '.join(reference.MODES)}", repr(to))
    grid = _grid.as_tensor(grid_thw)
    n = x.shape[0]
    x = _check.decided_from(x)
    num_out: int = n
    window_tensor = None
    if to == "window":
        if window is None:
            _check.fail("window as frames per segment with to='window'", "None")
        window_tensor = torch.as_tensor(window, dtype=torch.int64, device="cpu").contiguous()
        num_out = (
            -1 if torch.compiler.is_compiling() else reference.window_slots(_grid.rows(grid), window_tensor.tolist(), n)
        )
    elif not torch.compiler.is_compiling():
        _grid.check_total(_grid.rows(grid), n)
    if to == "center":
        if center is None or center.dim() != 2 or center.shape[1] != x.shape[1] or center.dtype != x.dtype:
            _check.fail(f"center of shape [S, {x.shape[1]}] in {x.dtype}", center)
        center = _check.decided_from(center)
        if cu_seqlens is None:
            cu_seqlens = _one_per_video(grid, x.device)
        else:
            cu_seqlens = _check.cu_seqlens(cu_seqlens, n)
        if cu_seqlens.shape[0] != center.shape[0] + 1:
            _check.fail(f"center for {cu_seqlens.shape[0] - 1} sequences", str(list(center.shape)))
    else:
        center = cu_seqlens = None
    return _op(x, grid, reference.MODES.index(to), window_tensor, center, cu_seqlens, num_out)
