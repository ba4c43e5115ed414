"""bipartite_merge against token merging, and bipartite_match against an exact nearest-neighbour search by faiss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines import bipartite as baseline
from bench.case import Case, Inputs, Provider, Target, compiled, tokens
from vidtok import ops

SHAPES = ((8, 197, 64, 768), (8, 577, 64, 1024), (64, 197, 64, 768))
TINY = ((2, 9, 8, 16),)


def _work(b: int, t: int, m: int, c: int, r: int, merge: bool) -> tuple[float, float]:
    flops = 2 * b * ((t + 1) // 2) * (t // 2) * m
    moved = 4 * (b * t * (c + m) + b * (t - r) * (c + 1)) if merge else 4 * b * (t * m + 3 * t)
    return moved, flops


def _packed(result: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, size = result[:2]
    return x.reshape(-1, x.shape[-1]), size.reshape(-1)


def merge_cases(tiny: bool = False) -> list[Case]:
    """Match and merge with r = 16 and r = T/2."""
    out = []
    for b, t, m, c in TINY if tiny else SHAPES:
        for r in (2, t // 2) if tiny else (16, t // 2):
            count = min(r, (t - 1) // 2)
            compiled_merge = compiled(baseline.eager)
            out.append(
                Case(
                    "bipartite_merge",
                    f"{b}×{t}×{c}, r={r}",
                    lambda seed, b=b, t=t, m=m, c=c: {"x": tokens(seed, b, t, c), "metric": tokens(seed + 1, b, t, m)},
                    Provider(
                        "vidtok",
                        "bipartite_merge",
                        lambda i, r=r: ops.bipartite_merge(i["x"], i["metric"], r, protected=1),
                        _packed,
                    ),
                    (
                        Provider(
                            "eager",
                            "match, gather, scatter_reduce",
                            lambda i, r=count: baseline.eager(i["x"], i["metric"], r),
                            _packed,
                        ),
                        Provider(
                            "careful",
                            "bmm, index_select, index_add",
                            lambda i, r=count: baseline.careful(i["x"], i["metric"], r),
                            _packed,
                        ),
                    ),
                    (_work(b, t, m, c, count, True),),
                    (Target("limit", 1.5), Target("eager", 4), Target("compile", 1.4)),
                    Provider(
                        "compile",
                        "torch.compile of eager",
                        lambda i, r=count, f=compiled_merge: f(i["x"], i["metric"], r),
                        _packed,
                    ),
                )
            )
    return out


def _pairs(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output that each token goes to, from a plan or from (source, destination) lists."""
    metric = inputs["metric"]
    batch, t = metric.shape[:2]
    owner = torch.arange(batch * t).view(batch, t)
    if isinstance(result, tuple):
        source, destination = result
        owner.scatter_(1, 2 * source, 2 * destination + 1 + torch.arange(batch)[:, None] * t)
        return (owner.view(-1),)
    counts = result.offset.diff().long()
    flat = owner.view(-1)
    flat[result.member.long()] = torch.repeat_interleave(result.anchor.long(), counts)
    return (flat,)


def _eager_pairs(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    _, source, destination = baseline.match(metric, r)
    return source[..., 0], destination[..., 0]


def faiss_pairs(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Each source's nearest destination by an exact inner-product index per sequence."""
    import faiss

    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, node = [], []
    for sequence in unit:
        index = faiss.IndexFlatIP(sequence.shape[-1])
        index.add(sequence[1::2].contiguous().numpy())
        score, nearest = index.search(sequence[::2].contiguous().numpy(), 1)
        best.append(torch.from_numpy(score[:, 0]))
        node.append(torch.from_numpy(nearest[:, 0]))
    scores, nodes = torch.stack(best), torch.stack(node)
    scores[:, 0] = -torch.inf
    source = scores.argsort(-1, descending=True)[:, :r]
    return source, nodes.gather(1, source)


def _has_faiss() -> bool:
    try:
        import faiss
    except ImportError:
        return False
    faiss.omp_set_num_threads(torch.get_num_threads())
    return True


def match_cases(tiny: bool = False) -> list[Case]:
    """The decision alone."""
    out = []
    for b, t, m, _ in TINY if tiny else SHAPES:
        r = 2 if tiny else 16
        compiled_match = compiled(_eager_pairs)
        others = [
            Provider("eager", "normalize, matmul, max, argsort", lambda i, r=r: _eager_pairs(i["metric"], r), _pairs)
        ]
        if _has_faiss():
            others.append(Provider("faiss", "faiss IndexFlatIP", lambda i, r=r: faiss_pairs(i["metric"], r), _pairs))
        out.append(
            Case(
                "bipartite_match",
                f"{b}×{t}×{m}, r={r}",
                lambda seed, b=b, t=t, m=m: {"metric": tokens(seed + 1, b, t, m)},
                Provider(
                    "vidtok",
                    "bipartite_match",
                    lambda i, r=r: ops.bipartite_match(i["metric"], r, protected=1),
                    _pairs,
                ),
                tuple(others),
                (_work(b, t, m, 0, r, False),),
                (),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, r=r, f=compiled_match: f(i["metric"], r),
                    _pairs,
                ),
            )
        )
    return out
