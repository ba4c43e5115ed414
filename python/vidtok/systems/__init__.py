"""Published systems, assembled from methods and attachments."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidtok.systems.prunevid import Qwen25VLPruneVid, Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2

_NAMES = {
    "Qwen25VLPruneVid": "prunevid",
    "Qwen25VLStage1Wrapper": "prunevid",
    "Qwen25VLStage1WrapperV2": "prunevid",
}

__all__ = ["Qwen25VLPruneVid", "Qwen25VLStage1Wrapper", "Qwen25VLStage1WrapperV2"]


def __getattr__(name: str) -> Any:
    # Each system is loaded on first use: they need transformers, and not the same parts of it.
    if name in _NAMES:
        return getattr(importlib.import_module(f"vidtok.systems.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'vidtok.systems' has no attribute '{name}'")
