"""What a benchmark case is: inputs, the sides that are compared, the work they cannot avoid, the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outcome = tuple[Tensor, ...]
Work = tuple[tuple[float, float], ...]


def _as_is(result: Any, inputs: Inputs) -> Outcome:
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Provider:
    """One side of the comparison.

    Args:
        role: ``vidtok``, ``eager`` (the published algorithm), ``compile``, ``careful`` or a name of its own.
        run: from the inputs to a result; what is timed.
        outcome: from the result to tensors that every side must agree on.
        differing: share of rows that may differ from the reference, for what is published with random noise.
    """

    role: str
    label: str
    run: Callable[[Inputs], Any]
    outcome: Callable[[Any, Inputs], Outcome] = _as_is
    differing: float = 0.0


@dataclass(frozen=True)
class Target:
    """``time / limit`` (against ``limit``), microseconds (against ``us``) or a speed-up over a role."""

    against: str
    bound: float

    @property
    def upper(self) -> bool:
        """Whether the bound is a maximum."""
        return self.against in ("limit", "us")

    def __str__(self) -> str:
        if self.against == "us":
            return f"≤ {self.bound:g} µs"
        if self.upper:
            return f"≤ {self.bound:g}"
        return f"≥ {self.bound:g}× {self.against}"


# "Level with": within what the pairs scatter by.
LEVEL = Target("careful", 0.95)


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Args:
        make: from a seed to the inputs; tensors in it are rotated through the cache.
        work: (bytes, FLOPs) that cannot be avoided, one pair per pass that must be made; the limit is their sum.
        compiled: the eager side under ``torch.compile``. Its mode ``reduce-overhead`` means CUDA graphs and gives the
            same code on a CPU, so the default mode is the better of the two.
        atol: absolute tolerance of float results, where the operator rounds to a grid.
    """

    operator: str
    name: str
    make: Callable[[int], Inputs]
    ours: Provider
    others: tuple[Provider, ...]
    work: Work | Callable[[], Work]
    targets: tuple[Target, ...] = ()
    compiled: Provider | None = None
    atol: float = 0.0

    def __str__(self) -> str:
        return f"{self.operator} {self.name}"

    def passes(self) -> Work:
        """``work``, counted now when it takes a run of the operators to know it."""
        return self.work() if callable(self.work) else self.work


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile with static shapes."""
    return torch.compile(function, dynamic=False)


def tokens(seed: int, *shape: int) -> Tensor:
    """Normal values rounded to eighths and cut at ±2: their products and sums are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul_(8).round_().clamp_(-16, 16).div_(8)


def filled(seed: int, rows: int, columns: int) -> Tensor:
    """Cheap distinct rows for operators whose time does not depend on values."""
    return tokens(seed, rows, 64).repeat(1, -(-columns // 64))[:, :columns].contiguous()


def clone(inputs: Inputs) -> Inputs:
    """The same inputs at other addresses."""
    return {k: _clone(v) for k, v in inputs.items()}


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_clone(v) for v in value]
    return value


def nbytes(value: Any) -> int:
    """Bytes of every tensor inside."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(nbytes(v) for v in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(nbytes(v) for v in value)
    return 0
