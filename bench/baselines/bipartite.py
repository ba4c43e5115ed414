"""Token merging (Bolya et al., ICLR 2023, §3) with one class token."""

from __future__ import annotations

import torch
from torch import Tensor


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unmerged sources, merged sources and their destinations, ``[B, k, 1]`` each."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    a, b = unit[..., ::2, :], unit[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., 0, :] = -torch.inf
    best, node = scores.max(dim=-1)
    edge = best.argsort(dim=-1, descending=True)[..., None]
    unmerged = edge[..., r:, :].sort(dim=1)[0]
    source = edge[..., :r, :]
    return unmerged, source, node[..., None].gather(dim=-2, index=source)


def _merge(x: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    a, b = x[..., ::2, :], x[..., 1::2, :]
    n, _, c = a.shape
    stay = a.gather(dim=-2, index=unmerged.expand(n, unmerged.shape[1], c))
    go = a.gather(dim=-2, index=source.expand(n, source.shape[1], c))
    b = b.scatter_reduce(-2, destination.expand(n, source.shape[1], c), go, reduce="sum")
    return torch.cat([stay, b], dim=1)


def eager(x: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Match, then the size-weighted mean by two merges."""
    lists = match(metric, r)
    size = torch.ones_like(x[..., 0, None])
    merged = _merge(x * size, *lists)
    size = _merge(size, *lists)
    return merged / size, size


def careful(x: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One row gather on the flattened batch, one index_add of the merged sources, one division of what they met."""
    batch, tokens, c = x.shape
    inverse = metric.square().sum(-1).rsqrt()
    a, b = metric[:, ::2] * inverse[:, ::2, None], metric[:, 1::2]
    scores = torch.bmm(a, b.transpose(1, 2)).mul_(inverse[:, None, 1::2])
    scores[:, 0] = -torch.inf
    best, node = scores.max(-1)
    edge = best.argsort(-1, descending=True)
    unmerged, source = edge[:, r:].sort(1)[0], edge[:, :r]
    destination = node.gather(1, source)
    first = torch.arange(batch, device=x.device)[:, None]
    base = first * tokens
    odd = torch.arange(1, tokens, 2, device=x.device)[None].expand(batch, -1)
    order = (torch.cat([2 * unmerged, odd], 1) + base).view(-1)
    rows = x.reshape(-1, c)
    out = rows.index_select(0, order)
    kept = tokens - r
    into = (destination + unmerged.shape[1] + first * kept).view(-1)
    out.index_add_(0, into, rows.index_select(0, (2 * source + base).view(-1)))
    ones = torch.ones(batch * kept, device=x.device)
    size = ones.index_add_(0, into, torch.ones(into.shape[0], device=x.device))
    met = (size > 1).nonzero().squeeze(1)
    out[met] = (out[met] / size[met, None]).to(out.dtype)
    return out.view(batch, kept, c), size.view(batch, kept, 1)
