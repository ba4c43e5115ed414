"""The cases of each operator. ``tiny=True`` gives the same cases at shapes that tests can afford."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import Case
from bench.suites import (
    adjacent_similarity,
    attention_topk,
    bipartite,
    cluster_dpc_knn,
    contour_select,
    plan_apply,
    pool_packed,
    position_remap,
    prunevid,
    topk_select,
)

SUITES: dict[str, Callable[..., list[Case]]] = {
    "bipartite_merge": bipartite.merge_cases,
    "bipartite_match": bipartite.match_cases,
    "cluster_dpc_knn": cluster_dpc_knn.cases,
    "attention_topk": attention_topk.cases,
    "topk_select": topk_select.cases,
    "plan_apply": plan_apply.gather_cases,
    "position_remap": position_remap.cases,
    "plan_apply_mean": plan_apply.mean_cases,
    "pool_packed": pool_packed.cases,
    "adjacent_similarity": adjacent_similarity.cases,
    "contour_select": contour_select.cases,
    "prunevid": prunevid.cases,
}
