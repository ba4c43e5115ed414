"""One call of each operator on a shape that the tuning tables name, for ``vidtok tune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vidtok import ops
from vidtok.plan import Plan, offsets

Call = Callable[[], Any]
Shape = Mapping[str, int]


def build(op: str, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Call:
    """A function that runs one operator once; its inputs are made here, from a fixed seed."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    return _BUILDERS[op](shape, normal, device)


Normal = Callable[..., Tensor]


def _halves(rows: int, device: Any) -> Plan:
    """Keeps every other token."""
    index = torch.arange(0, 2 * rows, 2, device=device)
    return Plan.gather(index, offsets([2 * rows], device), offsets([rows], device), 2 * rows)


def _plan_apply(shape: Shape, normal: Normal, device: Any) -> Call:
    plan, x = _halves(shape["rows"], device), normal(2 * shape["rows"], shape["channels"])
    return lambda: ops.plan_apply(plan, x)


def _position_remap(shape: Shape, normal: Normal, device: Any) -> Call:
    rows, riders = shape["rows"], shape["tensors"]
    plan = _halves(rows, device)
    columns = max(riders, shape["bytes"] // 8)
    per_rider = [columns // riders + (i < columns % riders) for i in range(riders)]
    tensors = [torch.arange(n * 2 * rows, device=device).view(n, 2 * rows) for n in per_rider]
    return lambda: ops.position_remap(plan, *tensors)


def _pool_packed(shape: Shape, normal: Normal, device: Any) -> Call:
    side = 16 if shape["rows"] % 256 == 0 else 1
    frames = shape["rows"] // side**2
    x = normal(4 * shape["rows"], shape["channels"])
    grid = [(frames, 2 * side, 2 * side)]
    return lambda: ops.pool_packed(x, grid, level=2.0)


def _adjacent_similarity(shape: Shape, normal: Normal, device: Any) -> Call:
    frames = 32 if shape["tokens"] % 32 == 0 else 1
    x, grid = normal(shape["tokens"], shape["channels"]), [(frames, shape["tokens"] // frames, 1)]
    return lambda: ops.adjacent_similarity(x, grid)


def _topk_select(shape: Shape, normal: Normal, device: Any) -> Call:
    score = normal(shape["segments"], shape["longest"])
    return lambda: ops.topk_select(score, shape["longest"] // 2)


def _attention_topk(shape: Shape, normal: Normal, device: Any) -> Call:
    length = shape["length"]
    query = normal(1, shape["q_heads"], shape["rows"], shape["dim"])
    key = normal(1, shape["kv_heads"], length, shape["dim"])
    span = [(0, 0, length)]
    return lambda: ops.attention_topk(query, key, length // 10, span=span)


def _bipartite(shape: Shape, normal: Normal, device: Any) -> Call:
    batch, tokens, heads = shape["batch"], shape["tokens"], shape["heads"]
    x = normal(batch, tokens, shape["channels"])
    metric = normal(batch, heads, tokens, shape["dim"]) if heads > 1 else normal(batch, tokens, shape["dim"])
    return lambda: ops.bipartite_merge(x, metric, tokens // 8)


def _cluster_dpc_knn(shape: Shape, normal: Normal, device: Any) -> Call:
    segments, longest = shape["segments"], shape["longest"]
    x, cu = normal(segments * longest, shape["channels"]), offsets([longest] * segments, device)
    return lambda: ops.cluster_dpc_knn(x, max(1, longest // 10), k=5, cu_seqlens=cu)


def _contour_select(shape: Shape, normal: Normal, device: Any) -> Call:
    sequences, longest = shape["sequences"], shape["longest"]
    x, cu = normal(sequences * longest, shape["channels"]), offsets([longest] * sequences, device)
    return lambda: ops.contour_select(x, max(1, longest // 16), rank=shape["rank"], cu_seqlens=cu)


_BUILDERS: dict[str, Callable[[Shape, Normal, Any], Call]] = {
    "adjacent_similarity": _adjacent_similarity,
    "attention_topk": _attention_topk,
    "bipartite": _bipartite,
    "cluster_dpc_knn": _cluster_dpc_knn,
    "contour_select": _contour_select,
    "plan_apply": _plan_apply,
    "pool_packed": _pool_packed,
    "position_remap": _position_remap,
    "topk_select": _topk_select,
}
