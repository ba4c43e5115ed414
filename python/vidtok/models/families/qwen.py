"""Qwen's video-language models."""

from __future__ import annotations

from vidtok.models.families._base import Family, grid_units

FAMILIES = (
    Family("qwen2_vl", "Qwen2VLModel", ("Qwen2VLForConditionalGeneration",), grid_units()),
    Family("qwen2_5_vl", "Qwen2_5_VLModel", ("Qwen2_5_VLForConditionalGeneration",), grid_units()),
    Family("qwen3_vl", "Qwen3VLModel", ("Qwen3VLForConditionalGeneration",), grid_units()),
)
