"""topk_select against torch.topk and sort."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Inputs, Provider, Target, compiled
from vidtok import ops


def _topk_sort(score: Tensor, keep: int) -> Tensor:
    return score.topk(keep).indices.sort().values


def _unsorted_topk_sort(score: Tensor, keep: int) -> Tensor:
    return score.topk(keep, sorted=False).indices.sort().values


def _scores(seed: int, n: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return {"score": torch.randperm(n, generator=generator).float() / n}


def cases(tiny: bool = False) -> list[Case]:
    """Half of one segment of distinct scores."""
    out = []
    for n, targets in ((64, ()),) if tiny else ((8192, (Target("us", 20),)), (32768, (Target("eager", 8),))):
        keep = n // 2
        compiled_topk = compiled(_topk_sort)
        out.append(
            Case(
                "topk_select",
                f"{keep} of {n}",
                lambda seed, n=n: _scores(seed, n),
                Provider("vidtok", "topk_select", lambda i, keep=keep: ops.topk_select(i["score"], keep)),
                (
                    Provider("eager", "topk, sort", lambda i, keep=keep: _topk_sort(i["score"], keep)),
                    Provider("careful", "unsorted topk, sort", lambda i, k=keep: _unsorted_topk_sort(i["score"], k)),
                ),
                ((4.0 * n + 8 * keep, 0.0),),
                targets,
                Provider(
                    "compile", "torch.compile of eager", lambda i, keep=keep, f=compiled_topk: f(i["score"], keep)
                ),
            )
        )
    return out
