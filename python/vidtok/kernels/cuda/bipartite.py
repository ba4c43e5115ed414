"""CUDA bipartite_match and bipartite_merge.

Counts of dense input with a prefix follow from shapes. A mask and cu_seqlens on the GPU are read once: the one sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels import tables
from vidtok.kernels.cuda import DTYPE_CODE, DTYPE_NAME, check, device_list, extension, launch, pointer, workspace
from vidtok.kernels.reference._numerics import bounds

_INT, _FLOAT = torch.int32, torch.float32


def _merges(free: Tensor, sources: Tensor, destinations: Tensor, r: int) -> Tensor:
    """r' of sequences, from their free tokens: all, even and odd ones."""
    out = torch.minimum(free // 2, sources).clamp(max=min(r, 2**31 - 1))
    return torch.where(destinations > 0, out, 0)


def _dense_merges(batch: int, tokens: int, r: int, prefix: int, mask: Tensor | None) -> int:
    """The r' that all sequences of a dense batch share."""
    if batch == 0 or tokens == 0:
        return 0
    if mask is not None:
        free = ~mask.cpu()
        return int(_merges(free.sum(1), free[:, ::2].sum(1), free[:, 1::2].sum(1), r).min())
    sources, destinations = (tokens + 1) // 2 - (prefix + 1) // 2, tokens // 2 - prefix // 2
    return min(r, (tokens - prefix) // 2, sources) if sources > 0 and destinations > 0 else 0


def _read(cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both on the host, by one copy."""
    if mask is None or not cu_seqlens.is_cuda or not mask.is_cuda:
        return cu_seqlens.cpu(), None if mask is None else mask.cpu()
    both = torch.cat([cu_seqlens.view(torch.uint8), mask.view(torch.uint8)]).cpu()
    split = both.shape[0] - mask.shape[0]
    return both[:split].view(_INT), both[split:].view(torch.bool)


def _ragged_outputs(ranges: list[tuple[int, int]], r: int, prefix: int, mask: Tensor | None) -> list[int]:
    """cu_seqlens of the outputs."""
    begin, end = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).unbind(1)
    tokens = end - begin
    if mask is None:
        kept = tokens.clamp(max=prefix)
        sources, destinations = (tokens + 1) // 2 - (kept + 1) // 2, tokens // 2 - kept // 2
    else:
        # Free tokens at even and odd places of the packed row, up to each token.
        free = (~mask).to(torch.int64)
        upto = torch.zeros(2, free.shape[0] + 1, dtype=torch.int64)
        for odd in (0, 1):
            upto[odd, 1 + odd :: 2] = free[odd::2]
        upto = upto.cumsum(1)
        free_of = upto[:, end] - upto[:, begin]
        parity = begin % 2
        sources = torch.where(parity == 0, free_of[0], free_of[1])
        destinations = torch.where(parity == 0, free_of[1], free_of[0])
    out = [0]
    for n in (tokens - _merges(sources + destinations, sources, destinations, r)).tolist():
        out.append(out[-1] + n)
    return out


def _call(
    name: str,
    x: Tensor | None,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    prefix: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    code = DTYPE_CODE.get(metric.dtype)
    x_code = 0 if x is None else DTYPE_CODE.get(x.dtype)
    if code is None or x_code is None:
        return NotImplemented
    shape, stride = metric.shape, metric.stride()
    tokens, dim = shape[-2], shape[-1]
    empty = metric.new_empty
    r = max(r, 0)
    if cu_seqlens is None:
        batch, n, longest = shape[0], shape[0] * tokens, tokens
        heads, by_batch, by_head = (shape[1], stride[0], stride[1]) if len(shape) == 4 else (1, stride[0], 0)
        m = batch * (tokens - _dense_merges(batch, tokens, r, prefix, mask))
        cu_out = empty(batch + 1, dtype=_INT)
    else:
        batch, n = cu_seqlens.shape[0] - 1, tokens
        heads, by_batch, by_head = (shape[0], 0, stride[0]) if len(shape) == 3 else (1, 0, 0)
        on_host, mask_on_host = _read(cu_seqlens, mask)
        ranges = bounds(on_host, tokens)
        longest = max((stop - start for start, stop in ranges), default=0)
        outputs = _ragged_outputs(ranges, r, prefix, mask_on_host)
        m = outputs[-1]
        cu_out = torch.tensor(outputs, dtype=_INT).to(metric.device, non_blocking=True)
        if cu_seqlens.device != metric.device:
            cu_seqlens = device_list([0, *(stop for _, stop in ranges)], metric, _INT)
    _check.below_2_31(n, "tokens")
    if heads < 1:
        return NotImplemented
    cu_in = empty(batch + 1, dtype=_INT)
    anchor, member, offset = empty(m, dtype=_INT), empty(n, dtype=_INT), empty(m + 1, dtype=_INT)
    weight = empty(n, dtype=_FLOAT)
    lists = (cu_in, cu_out, anchor, member, offset, weight)
    out: tuple[Tensor, ...] = lists
    channels, moved = 0, (0, 0, 0, 0, 0, 0, 0)
    if x is not None:
        channels = x.shape[-1]
        y, total = empty(m, channels, dtype=x.dtype), empty(m, dtype=_FLOAT)
        out = (y, total, *lists)
        x_batch = x.stride(0) if cu_seqlens is None else 0
        moved = (x.data_ptr(), x_code, channels, x_batch, x.stride(-2), y.data_ptr(), total.data_ptr())
    if m == 0:
        for t in (cu_in, cu_out, offset):
            t.zero_()
        return out
    if mask is not None and mask.device != metric.device:
        mask = mask.to(metric.device)
    ext = extension()
    on = launch(metric)
    knobs = tables.choose(
        "cuda", "bipartite", on.sm, DTYPE_NAME[metric.dtype],
        {"batch": batch, "tokens": longest, "dim": dim, "channels": channels, "heads": heads},
    )  # fmt: skip
    scratch = workspace(metric, ext.bipartite_workspace(n, batch))
    status = getattr(ext, name)(
        metric.data_ptr(), code, heads, dim, by_batch, by_head, stride[-2], pointer(size), pointer(mask),
        pointer(cu_seqlens), batch, tokens, r, prefix, m, longest, cu_in.data_ptr(), cu_out.data_ptr(),
        anchor.data_ptr(), member.data_ptr(), offset.data_ptr(), weight.data_ptr(), *moved, pointer(scratch),
        bool(knobs["one_block"]), knobs["tile"], *on,
    )  # fmt: skip
    check(status, name, metric)
    return out


def bipartite_match(
    metric: Tensor, r: int, size: Tensor | None, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_match`."""
    return _call("bipartite_match", None, metric, r, size, protected, mask, cu_seqlens)


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_merge`."""
    return _call("bipartite_merge", x, metric, r, size, protected, mask, cu_seqlens)
