"""Qwen's video-language models, and those built on their towers and decoders."""

from __future__ import annotations

from dataclasses import replace

from vidtok.models.families._base import Family, grid_units


def _family(name: str, stem: str, flat: str = "") -> Family:
    return Family(name, f"{stem}Model", (f"{stem}ForConditionalGeneration",), grid_units(), flat=flat)


FAMILIES = (
    _family("qwen2_vl", "Qwen2VL"),
    _family("qwen2_5_vl", "Qwen2_5_VL"),
    _family("qwen3_vl", "Qwen3VL"),
    _family("qwen3_vl_moe", "Qwen3VLMoe"),
    _family("qwen3_5", "Qwen3_5"),
    _family("qwen3_5_moe", "Qwen3_5Moe"),
    # Before, its eager masks overflow where a row is all padding.
    replace(_family("qwen4_exp", "Qwen4Exp"), since=(5, 23)),
    _family("qwen2_5_omni", "Qwen2_5OmniThinker", "model"),
    _family("qwen3_omni_moe", "Qwen3OmniMoeThinker", "model"),
    replace(_family("cohere_compass", "CohereCompass"), text_positions=False),
    _family("cosmos3_edge", "Cosmos3Edge"),
    _family("cosmos3_omni", "Cosmos3Omni"),
)
