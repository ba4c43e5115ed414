"""plan_apply as a gather against index_select, and as a cluster mean against one-hot matmul and index_add."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines import cluster_dpc_knn as baseline
from bench.case import LEVEL, Case, Inputs, Provider, Target, compiled, filled, tokens
from vidtok import ops
from vidtok.plan import Plan

CHANNELS = 3584
GATHERS = tuple((n, keep) for n in (2048, 8192, 32768) for keep in (n // 2, n // 10))
MEANS = ((196, 1024), (784, 1024), (3136, 1024), (196, 3584), (784, 3584), (3136, 3584))


def gather_plan(n: int, keep: int) -> Plan:
    """A random subset, ascending."""
    index = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:keep].sort().values
    ends = [torch.tensor([0, v], dtype=torch.int32) for v in (n, keep)]
    return Plan.gather(index, *ends, n)


def gather_targets(n: int) -> tuple[Target, ...]:
    """The faster of two index_select forms, and at 32k tokens the one on dim 1."""
    targets = [Target("limit", 1.2), Target("dim 0", 1.2), Target("dim 1", 1.2)]
    if n == 32768:
        targets[2] = Target("dim 1", 1.8)
    return tuple(targets)


def gather_cases(tiny: bool = False) -> list[Case]:
    """Embeddings alone, kept 1/2 and 1/10."""
    out = []
    for n, keep in ((40, 10),) if tiny else GATHERS:
        plan, c = gather_plan(n, keep), 64 if tiny else CHANNELS
        index = plan.anchor.long()
        out.append(
            Case(
                "plan_apply",
                f"gather {keep} of {n}×{c}",
                lambda seed, n=n, keep=keep, c=c: {"x": filled(seed, n, c), "out": torch.zeros(keep, c)},
                Provider("vidtok", "plan_apply", lambda i, plan=plan: ops.plan_apply(plan, i["x"])),
                (
                    Provider(
                        "dim 0",
                        "index_select dim 0, out=",
                        lambda i, index=index: torch.index_select(i["x"], 0, index, out=i["out"]),
                    ),
                    Provider(
                        "dim 1",
                        "index_select dim 1, out=",
                        lambda i, index=index: torch.index_select(i["x"][None], 1, index, out=i["out"][None])[0],
                    ),
                    Provider("eager", "x[:, index]", lambda i, index=index: i["x"][None][:, index][0]),
                ),
                ((8.0 * keep * c, 0.0),),
                gather_targets(n),
            )
        )
    return out


def _mean_inputs(seed: int, n: int, c: int, clusters: int) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    assignment = torch.cat([torch.arange(clusters), torch.randint(clusters, (n - clusters,), generator=generator)])
    assignment = assignment[torch.randperm(n, generator=generator)]
    count = torch.bincount(assignment, minlength=clusters).float()
    return {
        "x": tokens(seed, n, c),
        "assignment": assignment,
        "inverse": (1 / count)[:, None],
        "out": torch.zeros(clusters, c),
    }


def _mean_plan(n: int, c: int, clusters: int) -> Plan:
    assignment = _mean_inputs(0, n, 1, clusters)["assignment"]
    first = torch.full((clusters,), n).scatter_reduce_(0, assignment, torch.arange(n), "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(clusters)
    ends = [torch.tensor([0, v], dtype=torch.int32) for v in (n, clusters)]
    return Plan.from_assignment(place[assignment], first[order], *ends, n)


def mean_cases(tiny: bool = False) -> list[Case]:
    """N/2 clusters, the assignment known."""
    out = []
    for n, c in ((24, 16),) if tiny else MEANS:
        clusters = n // 2
        plan = _mean_plan(n, c, clusters)
        rank = plan_rank(plan, n, clusters)
        compiled_mean = compiled(baseline.one_hot_mean)

        def make(seed: int, n: int = n, c: int = c, clusters: int = clusters, rank: Tensor = rank) -> Inputs:
            inputs = _mean_inputs(seed, n, c, clusters)
            count = torch.bincount(rank, minlength=clusters).float()
            return {**inputs, "assignment": rank, "inverse": (1 / count)[:, None]}

        out.append(
            Case(
                "plan_apply",
                f"mean {n}×{c} to {clusters}",
                make,
                Provider("vidtok", "plan_apply", lambda i, plan=plan: ops.plan_apply(plan, i["x"])),
                (
                    Provider(
                        "eager",
                        "one_hot, matmul",
                        lambda i, k=clusters: baseline.one_hot_mean(i["x"], i["assignment"], k),
                    ),
                    Provider(
                        "careful",
                        "index_add, counts known, out=",
                        lambda i: baseline.index_add_mean(i["x"], i["assignment"], i["inverse"], i["out"]),
                    ),
                ),
                ((4.0 * (n + clusters) * c, 0.0),),
                (Target("limit", 1.3), Target("eager", 10), LEVEL),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, k=clusters, f=compiled_mean: f(i["x"], i["assignment"], k),
                ),
            )
        )
    return out


def plan_rank(plan: Plan, n: int, clusters: int) -> Tensor:
    """Output of each token."""
    rank = torch.empty(n, dtype=torch.int64)
    rank[plan.member.long()] = torch.repeat_interleave(torch.arange(clusters), plan.offset.diff().long())
    return rank
