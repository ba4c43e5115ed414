"""The shared list of operator cases: shapes, ragged, ties, zeros, NaN, empty, strided.

Values are multiples of 1/256 of small size, so that products and sums are exact in fp32 and every
backend must take the same decisions. ``random`` cases carry ordinary normal values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidtok import ops
from vidtok.plan import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Make:
    """Source of reproducible inputs in one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def exact(self, *shape: int, levels: int = 8) -> Tensor:
        """Multiples of 1/256 within ±levels/256: few distinct values, hence many ties."""
        return (torch.randint(-levels, levels + 1, shape, generator=self.generator) / 256).to(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def duplicated(self, frames: int, slots: int, channels: int) -> Tensor:
        """The same frame again and again, as in static video."""
        return self.exact(1, slots, channels).expand(frames, slots, channels).reshape(-1, channels).contiguous()

    def offsets(self, *lengths: int) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """One call of one operator; ``make`` gives its arguments."""

    op: str
    name: str
    make: Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]
    decides: bool = True  # integer outputs must agree exactly with the reference

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(ops, self.op)(*args, **kwargs)


CASES: list[Case] = []


def case(op: str, name: str, *, decides: bool = True) -> Callable[[Any], Any]:
    def add(make: Any) -> Any:
        CASES.append(Case(op, name, make, decides))
        return make

    return add


def with_rows(x: Tensor, *, zero: tuple[int, ...] = (), nan: tuple[int, ...] = (), inf: tuple[int, ...] = ()) -> Tensor:
    x = x.clone()
    for i in zero:
        x[..., i, :] = 0
    for i in nan:
        x[..., i, 0] = float("nan")
    for i in inf:
        x[..., i, -1] = float("inf")
    return x


# ---------------------------------------------------------------------- topk_select
for _n, _k in ((1, 1), (7, 3), (64, 64), (1000, 400), (4097, 1)):
    CASES.append(Case("topk_select", f"{_k} of {_n}", lambda m, n=_n, k=_k: ((m.exact(n), k), {})))
CASES += [
    Case("topk_select", "none", lambda m: ((m.exact(5), 0), {})),
    Case("topk_select", "empty", lambda m: ((m.exact(0), 0), {})),
    Case("topk_select", "rows", lambda m: ((m.exact(3, 50), 20), {})),
    Case("topk_select", "ragged", lambda m: ((m.exact(60), [3, 0, 40]), {"cu_seqlens": m.offsets(7, 0, 53)})),
    Case("topk_select", "equal", lambda m: ((torch.ones(300, dtype=m.dtype), 100), {})),
    Case("topk_select", "random", lambda m: ((m.normal(5000), 2500), {})),
]


@case("topk_select", "special values")
def _(m: Make) -> Any:
    score = m.exact(40)
    score[3], score[4], score[5:8], score[20] = float("inf"), float("-inf"), float("nan"), -0.0
    score[21] = 0.0
    return (score, 37), {}


# ---------------------------------------------------------------------- adjacent_similarity
for _to in ("previous", "center", "window"):
    for _name, _grid in (("one", [(4, 3, 5)]), ("several", [(1, 2, 2), (6, 1, 1), (3, 2, 7)]), ("none", [])):

        def _make(m: Make, to: str = _to, grid: Any = _grid) -> Any:
            n = sum(t * h * w for t, h, w in grid)
            windows = [w for t, _, _ in grid for w in ([t] if t < 3 else [2, t - 2])]
            extra: dict[str, Any] = {"to": to}
            if to == "window":
                extra["window"] = windows
            if to == "center":
                extra["center"] = m.exact(len(grid), 37)
            return (m.exact(n, 37), grid), extra

        CASES.append(Case("adjacent_similarity", f"{_to} {_name}", _make))
CASES += [
    Case("adjacent_similarity", "duplicated", lambda m: ((m.duplicated(5, 6, 64), [(5, 2, 3)]), {})),
    Case(
        "adjacent_similarity",
        "special rows",
        lambda m: ((with_rows(m.exact(24, 20), zero=(0, 7), nan=(9,)), [(4, 2, 3)]), {}),
    ),
    Case(
        "adjacent_similarity",
        "window special rows",
        lambda m: (
            (with_rows(m.exact(24, 20), zero=(0, 7), nan=(9,)), [(4, 2, 3)]),
            {"to": "window", "window": [1, 3]},
        ),
    ),
    Case("adjacent_similarity", "strided", lambda m: ((m.exact(12, 40)[:, ::2], [(3, 2, 2)]), {})),
    Case("adjacent_similarity", "random", lambda m: ((m.normal(60, 130), [(5, 3, 4)]), {}), decides=False),
]

# ---------------------------------------------------------------------- cluster_dpc_knn
CASES += [
    Case("cluster_dpc_knn", "small", lambda m: ((m.exact(9, 5), 3), {"k": 3})),
    Case("cluster_dpc_knn", "one token", lambda m: ((m.exact(1, 5), 1), {"k": 7})),
    Case("cluster_dpc_knn", "all centres", lambda m: ((m.exact(20, 16), 20), {"k": 4})),
    Case("cluster_dpc_knn", "empty", lambda m: ((m.exact(0, 4), 0), {"k": 2})),
    Case("cluster_dpc_knn", "duplicated", lambda m: ((m.duplicated(4, 8, 32), 6), {"k": 7})),
    Case("cluster_dpc_knn", "zeros", lambda m: ((torch.zeros(12, 8, dtype=m.dtype), 4), {"k": 3})),
    Case("cluster_dpc_knn", "wide", lambda m: ((m.exact(97, 200), 31), {"k": 7})),
    Case(
        "cluster_dpc_knn",
        "ragged",
        lambda m: ((m.exact(70, 24), torch.tensor([2, 0, 33, 1])), {"k": 5, "cu_seqlens": m.offsets(3, 0, 66, 1)}),
    ),
    Case(
        "cluster_dpc_knn",
        "special rows",
        lambda m: ((with_rows(m.exact(30, 16), zero=(1,), nan=(4,), inf=(8,)), 9), {"k": 3}),
    ),
    Case("cluster_dpc_knn", "strided", lambda m: ((m.exact(16, 32)[:, ::2], 5), {"k": 3})),
]

# ---------------------------------------------------------------------- attention_topk
CASES += [
    Case(
        "attention_topk",
        "one row",
        lambda m: ((m.exact(1, 4, 1, 16), m.exact(1, 2, 50, 16), 8), {"span": [(0, 5, 40)]}),
    ),
    Case(
        "attention_topk",
        "batch, groups, mask",
        lambda m: (
            (m.exact(2, 6, 3, 32), m.exact(2, 2, 300, 32), [4, 9]),
            {
                "span": [(0, 2, 20), (1, 0, 10), (0, 30, 60)],
                "group": [7, 1, 7],
                "mask": torch.arange(300)[None] >= torch.tensor([[0], [4]]),
            },
        ),
    ),
    Case(
        "attention_topk",
        "causal rows, max",
        lambda m: (
            (m.exact(2, 4, 20, 8), m.exact(2, 4, 33, 8), 5),
            {
                "span": torch.tensor([[0, 0, 9], [1, 3, 33]]),
                "query_position": torch.arange(40).view(2, 20) - 1,
                "reduce": "max",
            },
        ),
    ),
    Case(
        "attention_topk",
        "unused rows",
        lambda m: (
            (m.exact(2, 2, 2, 8), m.exact(2, 1, 9, 8), 2),
            {"span": [(0, 0, 5), (1, 0, 5)], "query_position": torch.tensor([[-1, -1], [3, -1]])},
        ),
    ),
    Case(
        "attention_topk",
        "equal keys",
        lambda m: ((m.exact(1, 4, 1, 16), m.exact(1, 2, 1, 16).expand(1, 2, 700, 16), 30), {"span": [(0, 1, 699)]}),
    ),
    Case("attention_topk", "no spans", lambda m: ((m.exact(1, 2, 1, 8), m.exact(1, 1, 4, 8), 3), {"span": []})),
    Case(
        "attention_topk",
        "random",
        lambda m: ((m.normal(1, 28, 1, 128), m.normal(1, 4, 1000, 128), 300), {"span": [(0, 10, 990)]}),
        decides=False,
    ),
    Case(
        "attention_topk",
        "cache layout",
        lambda m: ((m.exact(1, 4, 1, 16), m.exact(1, 60, 2, 16).transpose(1, 2), 8), {"span": [(0, 5, 40)]}),
    ),
]

# ---------------------------------------------------------------------- bipartite
for _op in ("bipartite_match", "bipartite_merge"):

    def _wrap(build: Any, op: str = _op) -> Any:
        def make(m: Make) -> Any:
            metric, r, kwargs = build(m)
            if op == "bipartite_match":
                return (metric, r), kwargs
            lead = metric.shape[-2:-1] if "cu_seqlens" in kwargs else (metric.shape[0], metric.shape[-2])
            return (m.exact(*lead, 40, levels=64), metric, r), kwargs

        return make

    for _name, _build in (
        ("prefix", lambda m: (m.exact(2, 21, 16), 5, {"protected": 1})),
        ("all", lambda m: (m.exact(3, 16, 16), 99, {})),
        ("none", lambda m: (m.exact(2, 9, 8), 0, {})),
        ("two tokens", lambda m: (m.exact(2, 2, 8), 1, {})),
        ("one token", lambda m: (m.exact(2, 1, 8), 1, {})),
        ("empty batch", lambda m: (m.exact(0, 6, 8), 1, {})),
        ("heads", lambda m: (m.exact(2, 4, 19, 8), 6, {"protected": 2})),
        ("mask", lambda m: (m.exact(2, 24, 8), 8, {"protected": m.ints(3, 2, 24) == 0})),
        ("sizes", lambda m: (m.exact(2, 30, 24), 9, {"size": 1.0 + m.ints(5, 2, 30).float()})),
        ("equal", lambda m: (torch.ones(2, 40, 16, dtype=m.dtype), 13, {})),
        ("special rows", lambda m: (with_rows(m.exact(1, 20, 16), zero=(2, 5), nan=(4, 7)), 8, {})),
        ("ragged", lambda m: (m.exact(60, 16), 7, {"cu_seqlens": m.offsets(3, 0, 1, 56), "protected": 1})),
        ("ragged heads", lambda m: (m.exact(2, 33, 16), 7, {"cu_seqlens": m.offsets(20, 13)})),
        ("vit", lambda m: (m.exact(2, 197, 64), 16, {"protected": 1})),
    ):
        CASES.append(Case(_op, _name, _wrap(_build)))
CASES.append(
    Case("bipartite_merge", "random", lambda m: ((m.normal(2, 50, 33), m.normal(2, 50, 17), 12), {}), decides=False)
)


# ---------------------------------------------------------------------- moves
def merged_plan(m: Make, n: int = 30, outputs: int = 11) -> Plan:
    owner = torch.cat([torch.arange(outputs), m.ints(outputs, n - outputs)])
    return Plan.from_assignment(owner, torch.arange(outputs), m.offsets(n), m.offsets(outputs), n)


def gather_plan(m: Make, lengths: tuple[int, ...] = (9, 0, 12), step: int = 2) -> Plan:
    keep, counts, base = [], [], 0
    for n in lengths:
        keep += list(range(base, base + n, step))
        counts.append(len(range(0, n, step)))
        base += n
    return Plan.gather(torch.tensor(keep, dtype=torch.int32), m.offsets(*lengths), m.offsets(*counts), base)


def padded_plan(m: Make) -> Plan:
    """Two dense rows of 12 with different numbers of dropped tokens, hence left padding."""
    visual = gather_plan(m, (6, 4), 2)
    return visual.lift(torch.tensor([1, 2, 3, 4, 5, 6, 15, 16, 17, 18]), m.offsets(12, 12), dense=True)


def lifted_merge_plan(m: Make) -> Plan:
    visual = merged_plan(m, 10, 4)
    return visual.lift(torch.arange(2, 12), m.offsets(12, 12), dense=True)


CASES += [
    Case("plan_apply", "gather", lambda m: ((gather_plan(m), m.exact(21, 50)), {})),
    Case("plan_apply", "gather large", lambda m: ((gather_plan(m, (700,)), m.normal(700, 1100)), {})),
    Case("plan_apply", "identity", lambda m: ((Plan.identity([4, 4]), m.normal(2, 4, 7)), {})),
    Case("plan_apply", "mean", lambda m: ((merged_plan(m), m.exact(30, 67)), {})),
    Case("plan_apply", "padded", lambda m: ((padded_plan(m), m.exact(2, 12, 19)), {})),
    Case("plan_apply", "padded merge", lambda m: ((lifted_merge_plan(m), m.exact(2, 12, 19)), {})),
    Case("plan_apply", "empty", lambda m: ((gather_plan(m, (0,)), m.exact(0, 8)), {})),
    Case("plan_apply", "strided rows", lambda m: ((merged_plan(m), m.exact(30, 80)[:, 5:60]), {})),
    Case("plan_apply", "strided columns", lambda m: ((merged_plan(m), m.exact(30, 80)[:, ::2]), {})),
    Case("plan_apply", "NaN", lambda m: ((merged_plan(m), with_rows(m.exact(30, 20), nan=(3,), inf=(5,))), {})),
    Case("position_remap", "packed", lambda m: ((gather_plan(m), m.exact(21), m.ints(9, 3, 21)), {})),
    Case(
        "position_remap",
        "dense riders",
        lambda m: (
            (
                padded_plan(m),
                m.exact(2, 12, 40),
                m.ints(50, 3, 2, 12),
                torch.ones(2, 12, dtype=torch.bool),
                m.ints(9, 2, 12),
            ),
            {"dim": [1, -1, -1, -1], "fill": [0, 0, 0, -100]},
        ),
    ),
    Case("position_remap", "strided", lambda m: ((gather_plan(m), m.exact(21, 8)[:, ::2]), {"dim": 0})),
    Case("position_remap", "empty", lambda m: ((gather_plan(m, (0,)), m.exact(0)), {})),
    Case("pool_packed", "divides", lambda m: ((m.exact(2 * 4 * 6, 33), [(2, 4, 6)]), {"level": 2})),
    Case("pool_packed", "overlaps", lambda m: ((m.exact(5 * 7 + 2 * 16, 40), [(1, 5, 7), (2, 4, 4)]), {"level": 3})),
    Case("pool_packed", "identity", lambda m: ((m.normal(24, 9), [(2, 3, 4)]), {"level": 1})),
    Case("pool_packed", "target", lambda m: ((m.exact(24 * 24, 65), [(1, 24, 24)]), {"out_hw": (5, 12)})),
    Case("pool_packed", "to one", lambda m: ((m.exact(50, 17), [(2, 5, 5)]), {"level": 99})),
    Case("pool_packed", "empty", lambda m: ((m.exact(0, 8), []), {"level": 2})),
    Case("pool_packed", "strided", lambda m: ((m.exact(16, 40)[:, ::2], [(1, 4, 4)]), {"level": 2})),
]

# ---------------------------------------------------------------------- contour_select
for _rule in ("stratified", "contour", "contour+fps"):
    CASES.append(
        Case("contour_select", _rule, lambda m, rule=_rule: ((m.normal(48, 40), 9), {"rule": rule}), decides=False)
    )
CASES += [
    Case("contour_select", "query", lambda m: ((m.normal(40, 33), 5), {"query": m.normal(33)}), decides=False),
    Case(
        "contour_select",
        "ragged",
        lambda m: ((m.normal(60, 20), [1, 0, 7]), {"cu_seqlens": m.offsets(3, 0, 57)}),
        decides=False,
    ),
    Case("contour_select", "equal", lambda m: ((torch.ones(20, 8, dtype=m.dtype), 6), {})),
    Case("contour_select", "NaN frame", lambda m: ((with_rows(m.normal(24, 12), nan=(5,)), 6), {}), decides=False),
    Case("contour_select", "empty", lambda m: ((m.exact(0, 8), 0), {})),
]
