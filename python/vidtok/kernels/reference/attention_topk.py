"""Importance of keys as a few query rows see them, and the best of each group of spans."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import accumulate_dtype, rank, round_bits

_ROWS_AT_ONCE = 16


def importance(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, query_position: Tensor | None, use_max: bool
) -> Tensor:
    """Softmax over visible keys, reduced over heads and rows: fp32 ``[B, L]``."""
    batch, heads, width, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    acc = accumulate_dtype(query.dtype)
    out = torch.zeros(batch, length, dtype=acc, device=key.device)
    used = torch.zeros(batch, dtype=acc, device=key.device)
    place = torch.arange(length, device=key.device)
    for start in range(0, width, _ROWS_AT_ONCE):
        q = query[:, :, start : start + _ROWS_AT_ONCE].to(acc)
        rows = q.shape[2]
        q = q.reshape(batch, kv_heads, heads // kv_heads * rows, -1)
        logits = (q @ key.to(acc).transpose(2, 3) * scale).view(batch, heads, rows, length)
        visible = torch.ones(batch, 1, rows, length, dtype=torch.bool, device=key.device)
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        if query_position is not None:
            limit = query_position[:, start : start + rows]
            visible = visible & (place <= limit[:, None, :, None])
        logits = logits.masked_fill(~visible, -torch.inf)
        some = visible.any(-1, keepdim=True)
        share = torch.where(some, torch.softmax(logits, -1), 0.0)
        if use_max:
            out = torch.maximum(out, share.amax((1, 2)))
        else:
            out = out + share.sum((1, 2))
            used = used + some.to(acc).sum((1, 2, 3)) * heads
    return out if use_max else out / used.clamp(min=1)[:, None]


def group_order(group: Tensor | None, spans: int) -> list[list[int]]:
    """Span numbers of each group, groups by first appearance."""
    if group is None:
        return [[s] for s in range(spans)]
    members: dict[int, list[int]] = {}
    for s, g in enumerate(group.tolist()):
        members.setdefault(g, []).append(s)
    return list(members.values())


def attention_topk(
    query: Tensor,
    key: Tensor,
    keep: list[int],
    span: Tensor,
    group: Tensor | None,
    scale: float,
    mask: Tensor | None,
    query_position: Tensor | None,
    use_max: bool,
    num_index: int,
    num_score: int,
) -> tuple[Tensor, Tensor]:
    """Selected positions and the score of every span token."""
    table = round_bits(importance(query, key, scale, mask, query_position, use_max))
    batch, length = table.shape
    rows = span.tolist()
    for b, lo, hi in rows:
        if not (0 <= b < batch and 0 <= lo <= hi <= length):
            raise IndexError(f"expected spans (row, start, stop) inside [{batch}, {length}], got {(b, lo, hi)}")
    parts = [table[b, lo:hi] for b, lo, hi in rows]
    groups = group_order(group, len(rows))
    budgets = keep * len(groups) if len(keep) == 1 else keep
    if len(budgets) != len(groups):
        raise ValueError(f"expected one keep or one for each of {len(groups)} groups, got {len(budgets)}")
    picked = []
    for members, budget in zip(groups, budgets):
        place = torch.cat([torch.arange(*rows[s][1:], device=key.device) for s in members])
        if bool((place.diff() <= 0).any()) or len({rows[s][0] for s in members}) > 1:
            raise ValueError(f"expected a group's spans ascending in one row, got {[rows[s] for s in members]}")
        if not 0 <= budget <= place.shape[0]:
            raise ValueError(f"expected keep between 0 and the group's {place.shape[0]} tokens, got {budget}")
        picked.append(place[rank(torch.cat([parts[s] for s in members]))[:budget].sort().values])
    empty = torch.empty(0, dtype=torch.int64, device=key.device)
    return torch.cat([empty, *picked]), torch.cat([table.new_empty(0), *parts])
