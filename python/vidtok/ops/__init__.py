"""The operators: decide which tokens go together, and move tokens by a plan."""

from vidtok.ops.adjacent_similarity import adjacent_similarity
from vidtok.ops.attention_topk import attention_topk
from vidtok.ops.bipartite import bipartite_match, bipartite_merge
from vidtok.ops.cluster_dpc_knn import cluster_dpc_knn
from vidtok.ops.contour_select import contour_select
from vidtok.ops.plan_apply import plan_apply
from vidtok.ops.pool_packed import pool_packed
from vidtok.ops.position_remap import position_remap
from vidtok.ops.topk_select import topk_select

__all__ = [
    "adjacent_similarity",
    "attention_topk",
    "bipartite_match",
    "bipartite_merge",
    "cluster_dpc_knn",
    "contour_select",
    "plan_apply",
    "pool_packed",
    "position_remap",
    "topk_select",
]
