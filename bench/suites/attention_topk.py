"""attention_topk, score and selection together, for one query row of 28 heads on 4 KV heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.baselines import attention_topk as baseline
from bench.case import Case, Inputs, Provider, Target, compiled, tokens
from vidtok import ops

HEADS, KV_HEADS, DIM = 28, 4, 128
# Scores nearer than the 16 significant bits kept may change places at the border of the selection.
BORDER = 0.003


def _chosen(result: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    index, score = result
    chosen = torch.zeros(score.shape[0], dtype=torch.bool)
    chosen[index] = True
    return chosen, score


def cases(tiny: bool = False) -> list[Case]:
    """Every key is a visual token and half of them are kept."""
    out = []
    for n in (32,) if tiny else (2048, 8192, 32768):
        keep = n // 2
        span = torch.tensor([[0, 0, n]])
        compiled_scores = compiled(baseline.eager)
        out.append(
            Case(
                "attention_topk",
                f"{n} tokens, {HEADS} on {KV_HEADS} heads",
                lambda seed, n=n: {
                    "query": tokens(seed, 1, HEADS, 1, DIM),
                    "key": tokens(seed + 1, 1, KV_HEADS, n, DIM) / 4,
                },
                Provider(
                    "vidtok",
                    "attention_topk",
                    lambda i, keep=keep, span=span: ops.attention_topk(i["query"], i["key"], keep, span=span),
                    _chosen,
                    BORDER,
                ),
                (
                    Provider(
                        "eager",
                        "repeat_kv, matmul, softmax, topk, sort",
                        lambda i, keep=keep: baseline.eager(i["query"], i["key"], keep),
                        _chosen,
                        BORDER,
                    ),
                    Provider(
                        "careful",
                        "grouped matmul, softmax, topk, sort",
                        lambda i, keep=keep: baseline.careful(i["query"], i["key"], keep),
                        _chosen,
                        BORDER,
                    ),
                ),
                ((4.0 * KV_HEADS * n * DIM + 4 * n + 8 * keep, 2.0 * HEADS * n * DIM),),
                (Target("limit", 1.5), Target("eager", 10), Target("careful", 1.8), Target("compile", 1.3)),
                Provider(
                    "compile",
                    "torch.compile of eager",
                    lambda i, keep=keep, f=compiled_scores: f(i["query"], i["key"], keep),
                    _chosen,
                    BORDER,
                ),
            )
        )
    return out
