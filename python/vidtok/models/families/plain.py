"""Language models without a vision tower of their own: the caller names the visual tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vidtok.models.families._base import Family, Grid, Media


def _none(media: Media) -> list[tuple[Tensor, Grid]]:
    return []


def _plain(name: str, stem: str, positions: Literal["rope", "none"] = "rope") -> Family:
    return Family(
        name,
        f"{stem}Model",
        (f"{stem}ForCausalLM",),
        _none,
        language="",
        towers=(),
        video=(),
        image=(),
        positions=positions,
        plain=True,
    )


FAMILIES = (
    _plain("llama", "Llama"),
    _plain("mistral", "Mistral"),
    _plain("nemotron_h", "NemotronH", "none"),
    _plain("qwen2", "Qwen2"),
    _plain("qwen3", "Qwen3"),
)
