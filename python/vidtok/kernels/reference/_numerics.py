"""Rounding and order shared by every operator: equal tokens must tie exactly, and the index decides.

Compared quantities are rounded to a fixed grid, half to even, before any comparison: two fp32
summation orders differ in the last bits, and cos = 1 ± one ulp would otherwise decide by accident.
"""

from __future__ import annotations

import torch
from torch import Tensor

COSINE_STEPS = {torch.float64: 2.0**20, torch.float32: 2.0**20, torch.bfloat16: 2.0**16, torch.float16: 2.0**16}
SCORE_BITS = 16


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every input but the fp64 of the oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_cosine(cosine: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp to [−1, 1] and round to the grid of the input's dtype; NaN stays NaN."""
    steps = COSINE_STEPS[dtype]
    return torch.round(cosine.clamp(-1.0, 1.0) * steps) / steps


def round_bits(x: Tensor, bits: int = SCORE_BITS) -> Tensor:
    """Round to ``bits`` significant bits, half to even; NaN and infinities stay."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)
    return torch.where(torch.isfinite(x), rounded, x)


def inverse_norm(x: Tensor) -> Tensor:
    """1/‖row‖, 0 for a zero row; NaN or an overflowing norm gives NaN."""
    squared = (x * x).sum(-1)
    inverse = torch.where(squared == 0, 0.0, squared.rsqrt())
    return torch.where(torch.isfinite(squared), inverse, torch.nan)


def rank(score: Tensor) -> Tensor:
    """Indices by score descending, then index ascending; −inf after finite scores, NaN last. 1-D."""
    nan = torch.isnan(score)
    order = torch.argsort(torch.where(nan, -torch.inf, score), descending=True, stable=True)
    return order[torch.argsort(nan[order].to(torch.int8), stable=True)]


def bounds(cu_seqlens: Tensor | None, total: int) -> list[tuple[int, int]]:
    """(start, stop) of each sequence on the host."""
    if cu_seqlens is None:
        return [(0, total)]
    cu = cu_seqlens.tolist()
    if cu[0] != 0 or cu[-1] != total or any(a > b for a, b in zip(cu, cu[1:])):
        raise IndexError(f"expected cu_seqlens that start at 0, never fall and end at {total}, got {cu[:12]}")
    return list(zip(cu, cu[1:]))
