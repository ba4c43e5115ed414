"""The prompt of one video and one question, as token ids."""

from __future__ import annotations

from typing import Any

from vidtok.data import Patches, PatchSpec, Video
from vidtok.data.prompt import build as build_prompt
from vidtok.data.prompt import to_device

__all__ = ["build", "to_device"]


def build(model: Any, tokenizer: Any, video: Video, patches: Patches, spec: PatchSpec, question: str) -> dict[str, Any]:
    """Inputs of ``generate`` for one video, see :func:`vidtok.data.prompt.build`."""
    return build_prompt(model, tokenizer, [(video, patches)], spec, question)
