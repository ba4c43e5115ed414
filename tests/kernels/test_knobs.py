"""Every value of every knob that the tables may choose runs in the stand-in and gives what the reference gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vidtok.cli import calls
from vidtok.kernels import tables
from vidtok.kernels.select import use_backend
from vidtok.plan import Plan

BACKEND = "cuda" if os.environ.get("VIDTOK_CUDA_MODULE") else "triton"
SHAPES = {
    "adjacent_similarity": {"tokens": 64, "channels": 200},
    "attention_topk": {"length": 300, "q_heads": 4, "kv_heads": 2, "dim": 32, "rows": 3},
    "bipartite": {"batch": 1, "tokens": 140, "dim": 24, "channels": 40, "heads": 1},
    "cluster_dpc_knn": {"segments": 1, "longest": 70, "channels": 40},
    "contour_select": {"sequences": 2, "longest": 40, "rank": 6, "channels": 40},
    "plan_apply": {"rows": 40, "channels": 96, "itemsize": 4},
    "pool_packed": {"rows": 7, "channels": 96, "itemsize": 4},
    "position_remap": {"rows": 40, "tensors": 4, "bytes": 64},
    "topk_select": {"segments": 2, "longest": 700},
}
# Triton's interpreter knows neither warps nor stages.
LEFT = () if BACKEND == "cuda" else ("num_warps", "num_stages")


def cases() -> Iterator[Any]:
    for op in tables.OPERATORS:
        # The interpreter takes its time: one dtype.
        for dtype in tables.dtypes(op, 70)[-1 if BACKEND == "triton" else 0 :]:
            listed = tables.module(op).candidates(BACKEND, tables.GPUS[90], dtype, SHAPES[op])
            seen: set[tuple[int, ...]] = set()
            for candidate in listed:
                values = tuple(v for name, v in candidate.knobs.items() if name not in LEFT)
                if candidate.rejected is None and values not in seen:
                    seen.add(values)
                    yield pytest.param(op, dtype, candidate.knobs, id=f"{op}-{dtype}-{values}")


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Plan):
        return [out.anchor, out.member, out.offset, out.weight]
    if isinstance(out, Tensor):
        return [out]
    return [t for part in out for t in tensors(part)]


@pytest.mark.parametrize("op,dtype,knobs", list(cases()))
def test_every_choice_gives_what_the_reference_gives(op: str, dtype: str, knobs: dict[str, int]) -> None:
    call = calls.build(op, SHAPES[op], getattr(torch, dtype), "cpu")
    with use_backend("reference"):
        wanted = tensors(call())
    with use_backend(BACKEND), tables.forced(BACKEND, op, knobs) as imposed:
        found = tensors(call())
    assert imposed.asked, "the reference served"
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b)
        else:
            tight = dtype == "float32"
            torch.testing.assert_close(a, b, rtol=1e-5 if tight else 1e-2, atol=1e-5 if tight else 2e-2)
