"""Attention of the last query row to visual tokens, and the best of them, as PyramidDrop ranks its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_kv(key: Tensor, times: int) -> Tensor:
    """``[B, Hkv, L, D]`` to ``[B, Hkv·times, L, D]``."""
    b, h, length, d = key.shape
    return key[:, :, None].expand(b, h, times, length, d).reshape(b, h * times, length, d)


def eager(query: Tensor, key: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Keys repeated for every query head, softmax in fp32, mean over heads, top-k, sort."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    weights = torch.matmul(query, key.transpose(2, 3)) / query.shape[-1] ** 0.5
    score = torch.softmax(weights, dim=-1, dtype=torch.float32).mean(dim=1)[:, -1]
    index = score.topk(keep, dim=-1).indices.sort(dim=-1).values
    return index[0], score[0]


def careful(query: Tensor, key: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """One matmul per KV head over its group of queries, nothing repeated."""
    b, hq, w, d = query.shape
    hkv = key.shape[1]
    grouped = query.reshape(b, hkv, hq // hkv * w, d) * d**-0.5
    weights = torch.matmul(grouped, key.transpose(2, 3))
    score = torch.softmax(weights, dim=-1).view(b, hq, -1).mean(dim=1)
    index = score.topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values
    return index[0], score[0]
