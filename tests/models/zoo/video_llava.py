"""Video-LLaVA: videos ``[V, T, C, H, W]``, every patch and the class token of each frame."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION = "video_llava", (4, 57)
ROWS: list[list[_common.Clip]] = [[("video", 3, 56)], [("video", 3, 56), ("video", 3, 56)], [("video", 3, 56)]]


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        text_config={"model_type": "llama", **_common.text_config(layers)},
        vision_config=_frames.clip_tower(),
        image_token_index=_common.IMAGE,
        video_token_index=_common.VIDEO,
    )
    return _common.build(VideoLlavaForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.run(17), side, seed)
    return {**out, "pixel_values_videos": torch.stack(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _common.dense_row(inputs, samples, i, "pixel_values_videos")
