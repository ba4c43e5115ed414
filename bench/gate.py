"""The correctness gate: no side is timed before its result agrees with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Inputs, Outcome, Provider
from vidtok.kernels.select import use_backend


class GateError(AssertionError):
    """A side whose result differs from the reference."""


def expected(case: Case, inputs: Inputs) -> Outcome:
    """What the reference backend gives for the inputs."""
    with torch.no_grad(), use_backend("reference"):
        return case.ours.outcome(case.ours.run(inputs), inputs)


def share_differing(got: Tensor, wanted: Tensor, atol: float = 0.0) -> float:
    """Share of rows with an entry that differs: at all for integers, by rounding for floats."""
    if got.shape != wanted.shape:
        return 1.0
    if got.numel() == 0:
        return 0.0
    if wanted.is_floating_point():
        scale = wanted.double().abs()
        scale = float(scale[torch.isfinite(scale)].max()) if torch.isfinite(scale).any() else 1.0
        atol = max(atol, 1e-5 * scale)
        same = torch.isclose(got.double(), wanted.double(), rtol=1e-3, atol=atol, equal_nan=True)
    else:
        same = got == wanted
    return float((~same.reshape(same.shape[0], -1).all(1)).double().mean())


def check(case: Case, provider: Provider, inputs: Inputs, wanted: Outcome) -> None:
    """Raise unless the provider's result agrees with ``wanted``."""
    with torch.no_grad():
        got = provider.outcome(provider.run(inputs), inputs)
    if len(got) != len(wanted):
        raise GateError(f"{case}: {provider.label} gives {len(got)} results, expected {len(wanted)}")
    for i, (a, b) in enumerate(zip(got, wanted)):
        share = share_differing(a, b, case.atol)
        if share > provider.differing:
            raise GateError(
                f"{case}: result {i} of {provider.label} {list(a.shape)} differs from the reference {list(b.shape)} "
                f"in {share:.3%} of its rows, allowed {provider.differing:.3%}"
            )
