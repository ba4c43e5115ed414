"""LLaVA's descendants: videos are dense tensors of frames."""

from __future__ import annotations

import math
from typing import Any

from vidtok.models.families._base import Family
from vidtok.models.families._runs import dense_units, frame_units


def _patches(config: Any) -> int:
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    size, patch = (v[0] if isinstance(v, (list, tuple)) else v for v in (size, patch))
    return int(size) // int(patch)


def _halved(config: Any) -> tuple[int, int]:
    side = math.ceil(_patches(config) / 2)
    return side, side


def _pooled(config: Any) -> tuple[int, int]:
    side = _patches(config) // config.spatial_pool_stride
    return side, side


FAMILIES = (
    Family(
        "llava_onevision",
        "LlavaOnevisionModel",
        ("LlavaOnevisionForConditionalGeneration",),
        dense_units(_halved, extra=1),
        towers=("vision_tower",),
        positions="rope",
        images=False,
    ),
    Family(
        "llava_next_video",
        "LlavaNextVideoModel",
        ("LlavaNextVideoForConditionalGeneration",),
        dense_units(_pooled),
        towers=("vision_tower",),
        positions="rope",
        images=False,
    ),
    Family(
        "video_llava",
        "VideoLlavaModel",
        ("VideoLlavaForConditionalGeneration",),
        dense_units(),
        towers=("video_tower", "image_tower"),
        positions="rope",
        images=False,
    ),
    Family(
        "perception_lm",
        "PerceptionLMModel",
        ("PerceptionLMForConditionalGeneration",),
        dense_units(),
        towers=("vision_tower",),
        positions="rope",
        images=False,
        tagged=False,
    ),
    Family(
        "internvl",
        "InternVLModel",
        ("InternVLForConditionalGeneration",),
        frame_units(),
        towers=("vision_tower",),
        positions="rope",
        images=False,
        frames=True,
    ),
)
