"""Bipartite matching and merging of one set of tokens, sequence by sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import accumulate_dtype, bounds, inverse_norm, rank, round_cosine


class Lists(NamedTuple):
    """The tensors of a plan."""

    cu_seqlens_in: Tensor
    cu_seqlens_out: Tensor
    anchor: Tensor
    member: Tensor
    offset: Tensor
    weight: Tensor


def merge_count(r: int, tokens: int, protected: int, sources: int, destinations: int) -> int:
    """How many of the ``r`` asked-for merges one sequence allows."""
    return max(0, min(r, (tokens - protected) // 2, sources)) if destinations else 0


def _protected_mask(tokens: int, protected: int, mask: Tensor | None, device: torch.device) -> Tensor:
    if mask is not None:
        return mask.bool()
    return torch.arange(tokens, device=device) < protected


def _possible(kept: Tensor, r: int) -> int:
    odd = torch.arange(kept.shape[0], device=kept.device) % 2 == 1
    return merge_count(r, kept.shape[0], int(kept.sum()), int((~kept & ~odd).sum()), int((~kept & odd).sum()))


def match_one(metric: Tensor, kept: Tensor, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output order (anchors) and, for every token, the output it goes to. ``metric`` ``[T, Cm]`` in fp32."""
    tokens = metric.shape[0]
    place = torch.arange(tokens, device=metric.device)
    source, destination = place[~kept & (place % 2 == 0)], place[~kept & (place % 2 == 1)]
    if r > 0:
        inverse = inverse_norm(metric)
        cosine = (metric[source] @ metric[destination].T) * inverse[source, None] * inverse[None, destination]
        cosine = round_cosine(cosine, dtype)
        best, target = torch.where(torch.isnan(cosine), -torch.inf, cosine).max(1)
        target = (cosine.nan_to_num(-torch.inf) == best[:, None]).to(torch.int8).argmax(1)
        merged = rank(best)[:r].sort().values
    else:
        merged = target = place[:0]
    stays = torch.ones(source.shape[0], dtype=torch.bool, device=metric.device)
    stays[merged] = False
    anchor = torch.cat([place[kept], source[stays], destination])
    output = torch.empty(tokens, dtype=torch.int64, device=metric.device)
    output[anchor] = torch.arange(anchor.shape[0], device=metric.device)
    output[source[merged]] = output[destination[target[merged]]]
    return anchor, output


def sequences(
    metric: Tensor, r: int, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor, int]], int | None]:
    """Per sequence: fp32 metric, protected mask and r'; for dense input also the common r'."""
    acc = accumulate_dtype(metric.dtype)
    out = []
    if cu_seqlens is None:
        dense = metric.to(acc).mean(1) if metric.dim() == 4 else metric.to(acc)
        masks = [
            _protected_mask(dense.shape[1], protected, None if mask is None else mask[b], metric.device)
            for b in range(dense.shape[0])
        ]
        common = min((_possible(m, r) for m in masks), default=0)
        return [(dense[b], masks[b], common) for b in range(dense.shape[0])], common
    packed = metric.to(acc).mean(0) if metric.dim() == 3 else metric.to(acc)
    for lo, hi in bounds(cu_seqlens, packed.shape[0]):
        kept = _protected_mask(hi - lo, protected, None if mask is None else mask[lo:hi], metric.device)
        out.append((packed[lo:hi], kept, _possible(kept, r)))
    return out, None


def bipartite_match(
    metric: Tensor, r: int, size: Tensor | None, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Lists:
    """The lists of the merge plan; ``size`` fp32, one per token, gives the weights."""
    device = metric.device
    anchors, outputs, lengths_in, lengths_out, base = [], [], [], [], 0
    out_base = 0
    for tokens, kept, count in sequences(metric, r, protected, mask, cu_seqlens)[0]:
        anchor, output = match_one(tokens, kept, count, metric.dtype)
        anchors.append(anchor + base)
        outputs.append(output + out_base)
        lengths_in.append(tokens.shape[0])
        lengths_out.append(anchor.shape[0])
        base += tokens.shape[0]
        out_base += anchor.shape[0]
    empty = torch.empty(0, dtype=torch.int64, device=device)
    anchor, output = torch.cat([empty, *anchors]), torch.cat([empty, *outputs])
    member = torch.argsort(output, stable=True)
    owner = output[member]
    ones = torch.ones(base, dtype=torch.float32, device=device)
    mass = (ones if size is None else size.reshape(-1).float())[member]
    total = torch.zeros(out_base, dtype=torch.float32, device=device).index_add_(0, owner, mass)
    offset = torch.zeros(out_base + 1, dtype=torch.int32, device=device)
    offset[1:] = torch.bincount(owner, minlength=out_base).cumsum(0)

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    return Lists(
        starts(lengths_in),
        starts(lengths_out),
        anchor.to(torch.int32),
        member.to(torch.int32),
        offset,
        mass / total[owner],
    )


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Merged tokens and sizes, packed, and the lists of the plan."""
    lists = bipartite_match(metric, r, size, protected, mask, cu_seqlens)
    packed = x.reshape(-1, x.shape[-1])
    acc = accumulate_dtype(x.dtype)
    mass = torch.ones(packed.shape[0], dtype=acc, device=x.device) if size is None else size.reshape(-1).to(acc)
    count = lists.offset.diff().long()
    owner = torch.repeat_interleave(torch.arange(count.shape[0], device=x.device), count)
    member = lists.member.long()
    total = torch.zeros(count.shape[0], dtype=acc, device=x.device).index_add_(0, owner, mass[member])
    merged = torch.zeros(count.shape[0], packed.shape[1], dtype=acc, device=x.device)
    merged.index_add_(0, owner, packed[member].to(acc) * mass[member, None])
    merged = (merged / total[:, None]).to(x.dtype)
    # A token that met no other is copied bit for bit.
    single = (count == 1).nonzero().squeeze(1)
    merged[single] = packed[member[lists.offset[:-1].long()[single]]]
    return merged, total.to(torch.float32), *lists
