"""position_remap of everything that rides along, embeddings included, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Inputs, Provider, filled
from bench.suites.plan_apply import CHANNELS, GATHERS, gather_plan, gather_targets
from vidtok import ops

RIDERS = ("embeds", "position", "mask", "labels")
DIMS = (0, 1, 0, 0)


def _inputs(seed: int, n: int, keep: int, c: int) -> Inputs:
    count = torch.arange(n)
    return {
        "embeds": filled(seed, n, c),
        "position": torch.stack([count, count // 7, count % 7]),
        "mask": torch.ones(n, dtype=torch.int64),
        "labels": count.flip(0).contiguous(),
        "out": [torch.zeros(keep, c), *(torch.zeros(s, dtype=torch.int64) for s in ((3, keep), (keep,), (keep,)))],
    }


def _dim0(i: Inputs, index: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.index_select(i[k], d, index, out=o) for k, d, o in zip(RIDERS, DIMS, i["out"]))


def _dim1(i: Inputs, index: Tensor) -> tuple[Tensor, ...]:
    """Batch first, as models hold them: ``[1, N, C]``, ``[3, 1, N]``, ``[1, N]``."""
    o = i["out"]
    return (
        torch.index_select(i["embeds"][None], 1, index, out=o[0][None])[0],
        torch.index_select(i["position"][:, None], 2, index, out=o[1][:, None])[:, 0],
        torch.index_select(i["mask"][None], 1, index, out=o[2][None])[0],
        torch.index_select(i["labels"][None], 1, index, out=o[3][None])[0],
    )


def _masked(i: Inputs, keep: Tensor) -> tuple[Tensor, ...]:
    return i["embeds"][keep], i["position"][:, keep], i["mask"][keep], i["labels"][keep]


def _tuple(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(result)


def cases(tiny: bool = False) -> list[Case]:
    """Embeddings, three rows of positions, mask and labels, kept 1/2 and 1/10."""
    out = []
    for n, keep in ((40, 10),) if tiny else GATHERS:
        plan, c = gather_plan(n, keep), 64 if tiny else CHANNELS
        index = plan.anchor.long()
        boolean = torch.zeros(n, dtype=torch.bool)
        boolean[index] = True
        out.append(
            Case(
                "position_remap",
                f"{keep} of {n}×{c} and 5 rows",
                lambda seed, n=n, keep=keep, c=c: _inputs(seed, n, keep, c),
                Provider(
                    "vidtok",
                    "position_remap",
                    lambda i, plan=plan: ops.position_remap(plan, *(i[k] for k in RIDERS), dim=DIMS),
                    _tuple,
                ),
                (
                    Provider("dim 0", "index_select dim 0, out=", lambda i, index=index: _dim0(i, index), _tuple),
                    Provider("dim 1", "index_select dim 1, out=", lambda i, index=index: _dim1(i, index), _tuple),
                    Provider("eager", "x[mask]", lambda i, boolean=boolean: _masked(i, boolean), _tuple),
                ),
                ((2.0 * keep * (4 * c + 5 * 8) + 4 * keep, 0.0),),
                gather_targets(n),
            )
        )
    return out
