"""cluster_dpc_knn against the published density-peak clustering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines import cluster_dpc_knn as baseline
from bench.case import Case, Inputs, Provider, Target, compiled, tokens
from vidtok import ops

K = 7
SHAPES = ((196, 1024), (784, 1024), (3136, 1024), (196, 3584), (784, 3584), (3136, 3584))
# Ranks of centres shift when one choice differs, so a token's centre is compared, not its rank.
NOISE = 0.02


def _centre_of(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    assignment, center = result
    assignment, center = assignment.reshape(-1), center.reshape(-1)
    chosen = torch.zeros(inputs["x"].shape[0], dtype=torch.bool)
    chosen[center] = True
    return center[assignment], chosen


def work(n: int, c: int) -> tuple[float, float]:
    """One sweep over the pairs of a segment; its distances fit into the workspace of a call."""
    return 4.0 * n * c + 16 * n, float(n) * n * c


def cases(tiny: bool = False) -> list[Case]:
    """Half of the tokens become centres."""
    out = []
    for n, c in ((24, 16),) if tiny else SHAPES:
        count = n // 2
        compiled_clusters = compiled(baseline.eager)
        out.append(
            Case(
                "cluster_dpc_knn",
                f"{n}×{c}, K={count}",
                lambda seed, n=n, c=c: {"x": tokens(seed, n, c)},
                Provider(
                    "vidtok",
                    "cluster_dpc_knn",
                    lambda i, count=count: ops.cluster_dpc_knn(i["x"], count, k=K),
                    _centre_of,
                    0.002 if n > 500 else 0.0,
                ),
                (
                    Provider(
                        "eager",
                        "cdist, topk, mask, argmin",
                        lambda i, count=count: baseline.eager(i["x"][None], count, K),
                        _centre_of,
                        1.0 if tiny else NOISE,
                    ),
                    Provider(
                        "careful",
                        "one matmul, in place",
                        lambda i, count=count: baseline.careful(i["x"], count, K),
                        _centre_of,
                        1.0 if tiny else NOISE,
                    ),
                ),
                (work(n, c),),
                (Target("limit", 2.2 if n == 196 else 1.6), Target("eager", 1.6), Target("compile", 1.5)),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, count=count, f=compiled_clusters: f(i["x"][None], count, K),
                    _centre_of,
                    1.0 if tiny else NOISE,
                ),
            )
        )
    return out
