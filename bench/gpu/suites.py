"""The cases of the GPU tables: shapes of real towers and videos, bf16 (fp16 before sm_80), data on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.baselines import adjacent_similarity as adjacent
from bench.baselines import attention_topk as attention
from bench.baselines import bipartite, pool
from bench.baselines import cluster_dpc_knn as cluster
from bench.baselines import prunevid as published
from bench.case import Case, Inputs, Provider, Target, compiled, tokens
from bench.suites.attention_topk import DIM, HEADS, KV_HEADS
from bench.suites.bipartite import _packed as merged
from bench.suites.plan_apply import gather_plan
from bench.suites.prunevid import OPTIONS, _unordered, _video, operator_work
from vidtok import methods, ops

FRAMES = 32
SIDES = (14, 20, 27)
CHANNELS = 3584
# Published code decides in the model's dtype; ours rounds cosines of exact products. Where decisions may differ,
# the gate compares nothing but the share that does.
ROUNDED = 0.9
MERGED_ATOL = 0.05


def _device_inputs(make: Callable[[int], Inputs], device: torch.device, dtype: torch.dtype) -> Callable[[int], Inputs]:
    def build(seed: int) -> Inputs:
        made = make(seed)
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in made.items()}

    return build


def merge_cases(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[Case]:
    """One ViT layer's merging, r = 16."""
    out = []
    shapes = [(b, t, m, c) for t, m, c in ((197, 64, 768), (577, 64, 1024)) for b in (32, 128)]
    for b, t, m, c in [(2, 9, 8, 16)] if tiny else shapes:
        r = 2 if tiny else 16
        size = torch.finfo(dtype).bits // 8
        flops = 2.0 * b * ((t + 1) // 2) * (t // 2) * m
        moved = size * (b * t * (c + m) + b * (t - r) * c) + 4.0 * b * (t - r)
        f = compiled(bipartite.eager)
        out.append(
            Case(
                "bipartite_merge",
                f"{b}×{t}×{c}, r={r}",
                _device_inputs(
                    lambda seed, b=b, t=t, m=m, c=c: {"x": tokens(seed, b, t, c), "metric": tokens(seed + 1, b, t, m)},
                    device,
                    dtype,
                ),
                Provider(
                    "vidtok",
                    "bipartite_merge",
                    lambda i, r=r: ops.bipartite_merge(i["x"], i["metric"], r, protected=1),
                    merged,
                ),
                (
                    Provider(
                        "eager",
                        "match, gather, scatter_reduce",
                        lambda i, r=r: bipartite.eager(i["x"], i["metric"], r),
                        merged,
                        ROUNDED,
                    ),
                ),
                ((moved, flops),),
                (Target("limit", 1.5), Target("eager", 8), Target("compile", 2)),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, r=r, f=f: f(i["x"], i["metric"], r),
                    merged,
                    ROUNDED,
                ),
                MERGED_ATOL,
            )
        )
    return out


def _chosen(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    index, score = result
    chosen = torch.zeros(score.shape[0], dtype=torch.bool, device=score.device)
    chosen[index] = True
    return chosen, score


def attention_cases(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[Case]:
    """One query row of 28 heads on 4 KV heads; half of the tokens are kept."""
    out = []
    for n in (64,) if tiny else (6400, 23328, 65536):
        keep = n // 2
        size = torch.finfo(dtype).bits // 8
        f = compiled(attention.eager)
        out.append(
            Case(
                "attention_topk",
                f"{n} tokens, 28 on 4 heads",
                _device_inputs(
                    lambda seed, n=n: {
                        "query": tokens(seed, 1, HEADS, 1, DIM),
                        "key": tokens(seed + 1, 1, KV_HEADS, n, DIM) / 4,
                    },
                    device,
                    dtype,
                ),
                Provider(
                    "vidtok",
                    "attention_topk",
                    lambda i, k=keep, n=n: ops.attention_topk(i["query"], i["key"], k, span=[(0, 0, n)]),
                    _chosen,
                    0.05,
                ),
                (
                    Provider(
                        "eager",
                        "repeat_kv, matmul, softmax, topk, sort",
                        lambda i, k=keep: attention.eager(i["query"], i["key"], k),
                        _chosen,
                        ROUNDED,
                    ),
                    Provider(
                        "careful",
                        "grouped matmul, softmax, topk, sort",
                        lambda i, k=keep: attention.careful(i["query"], i["key"], k),
                        _chosen,
                        ROUNDED,
                    ),
                ),
                ((float(size * KV_HEADS * n * DIM + 4 * n + 8 * keep), 2.0 * HEADS * n * DIM),),
                (Target("limit", 1.5), Target("eager", 10), Target("compile", 2)),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, k=keep, f=f: f(i["query"], i["key"], k),
                    _chosen,
                    ROUNDED,
                ),
            )
        )
    return out


def cluster_cases(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[Case]:
    """Frames as segments, half of the tokens become centres; the limit is one full Gram of 2N²C."""
    out = []
    for n in (16,) if tiny else tuple(s * s for s in SIDES):
        segments, c, count = (2, 32, 8) if tiny else (FRAMES, CHANNELS, n // 2)
        cu = torch.arange(segments + 1, dtype=torch.int32, device=device) * n
        size = torch.finfo(dtype).bits // 8
        f = compiled(cluster.eager)

        def batched(i: Inputs, segments: int = segments, n: int = n) -> Tensor:
            return i["x"].view(segments, n, -1)

        def centres(result: Any, inputs: Inputs, segments: int = segments, n: int = n) -> tuple[Tensor, ...]:
            center = result[1].reshape(segments, -1)
            if int(center.max()) >= n:
                center = center - torch.arange(segments, device=center.device)[:, None] * n
            chosen = torch.zeros(segments, n, dtype=torch.bool, device=center.device)
            return (chosen.scatter_(1, center, True).view(-1),)

        out.append(
            Case(
                "cluster_dpc_knn",
                f"{segments}×{n}×{c}, K={count}",
                _device_inputs(lambda seed, rows=segments * n, c=c: {"x": tokens(seed, rows, c)}, device, dtype),
                Provider(
                    "vidtok",
                    "cluster_dpc_knn",
                    lambda i, cu=cu, k=count: ops.cluster_dpc_knn(i["x"], k, k=7, cu_seqlens=cu),
                    centres,
                    0.02,
                ),
                (
                    Provider(
                        "eager",
                        "cdist, topk, mask, argmin",
                        lambda i, k=count, view=batched: cluster.eager(view(i).float(), k, 7),
                        centres,
                        ROUNDED,
                    ),
                ),
                ((float(size * segments * n * c + 16 * segments * n), 2.0 * segments * n * n * c),),
                (Target("limit", 1.8), Target("eager", 10), Target("compile", 5)),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, k=count, f=f, view=batched: f(view(i).float(), k, 7),
                    centres,
                    ROUNDED,
                ),
            )
        )
    return out


def move_cases(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[Case]:
    """Gather, positions, pooling and similarity of whole videos."""
    out = []
    size = torch.finfo(dtype).bits // 8
    goals = (Target("limit", 1.25), Target("eager", 3), Target("compile", 1.2))
    for side in (4,) if tiny else SIDES:
        frames, c = (2, 32) if tiny else (FRAMES, CHANNELS)
        n = frames * side * side
        keep = n // 4
        plan = gather_plan(n, keep).to(device)
        index = plan.anchor.long()
        grid = [(frames, side, side)]
        half = (side // 2, side // 2)

        def features(seed: int, n: int = n, c: int = c) -> Inputs:
            return {"x": tokens(seed, n, c)}

        def riders(seed: int, n: int = n) -> Inputs:
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, n, (3, n), generator=generator)
            return {"ids": ids, "mask": ids[0] > 3, "labels": ids[1].clone(), "size": tokens(seed, 1, n)[0].float()}

        def remapped(i: Inputs, index: Tensor = index) -> tuple[Tensor, ...]:
            return tuple(t.index_select(-1, index) for t in i.values())

        def maps(i: Inputs, frames: int = frames, side: int = side) -> Tensor:
            return i["x"].view(frames, side, side, -1)

        def rows(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
            x = result[0] if isinstance(result, tuple) else result
            return (x.reshape(-1, x.shape[-1]),)

        def similar(i: Inputs, frames: int = frames) -> Tensor:
            return adjacent.previous_eager(i["x"].view(frames, -1, i["x"].shape[-1]).float())

        def scored(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
            return (result.float().view(-1),)

        def case(
            op: str, name: str, make: Any, ours: Any, eager: Any, moved: float, how: str, outcome: Any = None,
            atol: float = 0.0,
        ) -> Case:  # fmt: skip
            extra = {} if outcome is None else {"outcome": outcome}
            f = compiled(eager)
            return Case(
                op,
                name,
                _device_inputs(make, device, dtype),
                Provider("vidtok", op, ours, **extra),
                (Provider("eager", how, eager, **extra),),
                ((moved, 0.0),),
                goals,
                Provider("compile", "torch.compile of eager", f, **extra),
                atol,
            )

        out += [
            case(
                "plan_apply",
                f"gather {keep} of {n}×{c}",
                features,
                lambda i, plan=plan: ops.plan_apply(plan, i["x"]),
                lambda i, index=index: i["x"][None][:, index][0],
                2.0 * size * keep * c,
                "x[:, index]",
            ),
            case(
                "position_remap",
                f"3 rows of ids, mask, labels, sizes of {n}",
                riders,
                lambda i, plan=plan: tuple(ops.position_remap(plan, *i.values(), dim=-1)),
                remapped,
                2.0 * keep * (4 * 8 + 1 + size) + 4.0 * keep,
                "index_select per tensor",
            ),
            case(
                "pool_packed",
                f"{frames}×{side}×{side} to {half[0]}×{half[1]}, {c}",
                features,
                lambda i, grid=grid, half=half: ops.pool_packed(i["x"], grid, out_hw=half),
                lambda i, half=half, maps=maps: pool.permuted(maps(i), half),
                size * (n + frames * half[0] * half[1]) * float(c),
                "permuted copy, adaptive_avg_pool2d",
                rows,
                MERGED_ATOL,
            ),
            case(
                "adjacent_similarity",
                f"{frames}×{side * side}×{c}",
                features,
                lambda i, grid=grid: ops.adjacent_similarity(i["x"], grid),
                similar,
                float(size * n * c + 4 * n),
                "normalize, multiply, sum",
                scored,
                2**-15,
            ),
        ]
    return out


def prunevid_cases(device: torch.device, dtype: torch.dtype, tiny: bool) -> list[Case]:
    """Stage 1 whole, decision and move."""
    frames, side, c = (8, 4, 64) if tiny else (FRAMES, 14, CHANNELS)
    grid = [(frames, side, side)]

    def work() -> tuple[tuple[float, float], ...]:
        share = torch.finfo(dtype).bits / 32  # the count is of fp32 bytes
        passes = operator_work(_video(0, frames, side * side, c)["x"], grid)
        return tuple((share * b, f) for b, f in passes)

    return [
        Case(
            "prunevid",
            f"{frames}×{side * side}×{c}",
            _device_inputs(lambda seed: _video(seed, frames, side * side, c), device, dtype),
            Provider(
                "vidtok",
                "methods.prunevid, plan_apply",
                lambda i: ops.plan_apply(methods.prunevid(i["x"], grid, **OPTIONS), i["x"]),
                lambda r, i: _unordered(r.cpu(), i),
                0.05,
            ),
            (
                Provider(
                    "eager",
                    "windows and frames in a loop",
                    lambda i: published.eager(i["x"].view(frames, side * side, c).float(), **OPTIONS),
                    lambda r, i: _unordered(r.cpu(), i),
                    1.0,
                ),
            ),
            work,
            (Target("us", 1000), Target("eager", 30)),
            None,
            MERGED_ATOL,
        )
    ]


SUITES: dict[str, Callable[[torch.device, torch.dtype, bool], list[Case]]] = {
    "bipartite_merge": merge_cases,
    "attention_topk": attention_cases,
    "cluster_dpc_knn": cluster_cases,
    "moves": move_cases,
    "prunevid": prunevid_cases,
}
