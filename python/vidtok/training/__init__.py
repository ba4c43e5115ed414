"""Token reduction in training loops."""

from __future__ import annotations

from vidtok.training.callback import TokenReduction

__all__ = ["TokenReduction"]
