"""contour_select against the same formula in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines import contour_select as baseline
from bench.case import Case, Inputs, Provider, tokens
from vidtok import ops

SEED, RANK = 0, 64


def _index(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    return (result if isinstance(result, Tensor) else result.index,)


def cases(tiny: bool = False) -> list[Case]:
    """One frame of each time segment."""
    out = []
    for frames, c, num in ((32, 16, 4),) if tiny else ((512, 1024, 32),):
        rank = min(RANK, frames // 4, c)
        generator = torch.Generator().manual_seed(SEED)
        basis = torch.linalg.qr(torch.randn(c, rank, dtype=torch.float64, generator=generator)).Q
        # Products by the basis, covariance, triangular solve; fp64 counts twice.
        flops = 2.0 * (2 * frames * c * rank + 2 * frames * rank * rank + frames * rank * rank)
        out.append(
            Case(
                "contour_select",
                f"{num} of {frames} frames×{c}",
                lambda seed, frames=frames, c=c: {"x": tokens(seed, frames, c)},
                Provider(
                    "vidtok", "contour_select", lambda i, num=num: ops.contour_select(i["x"], num, seed=SEED), _index
                ),
                (
                    Provider(
                        "eager",
                        "plain torch",
                        lambda i, basis=basis, num=num: baseline.eager(i["x"], basis, num),
                        _index,
                        0.1,
                    ),
                ),
                ((4.0 * frames * c, flops),),
            )
        )
    return out
