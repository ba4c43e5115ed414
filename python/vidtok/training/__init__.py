"""Token reduction in training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidtok.training.callback import TokenReduction

__all__ = ["TokenReduction"]


def __getattr__(name: str) -> Any:
    # The callback brings in the Trainer, which the retrieval commands do without.
    if name == "TokenReduction":
        from vidtok.training.callback import TokenReduction

        return TokenReduction
    raise AttributeError(f"module 'vidtok.training' has no attribute '{name}'")
