"""vidtok: fused kernels that make video-language models faster by giving them fewer visual tokens.

Decide, then move: a method computes a :class:`~vidtok.plan.Plan`, an operator moves tokens and
everything that rides along by it. ``vidtok.attach(model, visual="...")`` does both inside a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vidtok import data, evaluation, kernels, merge, methods, models, ops, spec, training
    from vidtok.kernels.reports import synchronize
    from vidtok.kernels.select import use_backend
    from vidtok.models.attach import attach, detach
    from vidtok.models.cache import LogicalCache
    from vidtok.models.drop import Drop
    from vidtok.plan import Plan

_MODULES = ("data", "evaluation", "kernels", "merge", "methods", "models", "ops", "plan", "spec", "systems", "training")
_NAMES = {
    "Drop": "vidtok.models.drop",
    "LogicalCache": "vidtok.models.cache",
    "Plan": "vidtok.plan",
    "attach": "vidtok.models.attach",
    "detach": "vidtok.models.attach",
    "synchronize": "vidtok.kernels.reports",
    "use_backend": "vidtok.kernels.select",
}

__all__ = [
    "Drop", "LogicalCache", "Plan", "__version__", "attach", "data", "detach", "evaluation", "kernels", "merge",
    "methods", "models", "ops", "spec", "synchronize", "training", "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import vidtok` costs next to nothing.
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"vidtok.{name}")
    raise AttributeError(f"module 'vidtok' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
