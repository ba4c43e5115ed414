"""GLM's video-language models, and ERNIE's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from vidtok.models.families._base import Family, grid_units


def _family(name: str, stem: str, positions: Literal["mrope", "none"] = "mrope") -> Family:
    # The frames of a video stand on the placeholder of images.
    heads = (f"{stem}ForConditionalGeneration",)
    return Family(name, f"{stem}Model", heads, grid_units(), video=("image_token_id",), positions=positions)


FAMILIES = (
    _family("glm4v", "Glm4v"),
    replace(_family("glm4v_moe", "Glm4vMoe"), text_positions=False),
    _family("glm46v", "Glm46V"),
    _family("glm_ocr", "GlmOcr"),
    replace(
        _family("glm5_next", "Glm5Next", "none"),
        spans=("video_start_token_id", "video_end_token_id"),
        since=(5, 17),
    ),
    Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeModel",
        ("Ernie4_5_VLMoeForConditionalGeneration",),
        grid_units(temporal="temporal_merge_size"),
        towers=("vision_tower",),
        text_positions=False,
    ),
)
