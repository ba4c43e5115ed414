"""LLaVA-NeXT-Video: videos ``[V, T, C, H, W]``, four pooled tokens a frame."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION, ROWS = "llava_next_video", (4, 57), _frames.DENSE


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", **_common.text_config(layers)},
        vision_config=_frames.clip_tower(),
        image_token_index=_common.IMAGE,
        video_token_index=_common.VIDEO,
        image_grid_pinpoints=[[56, 56]],
    )
    return _common.build(LlavaNextVideoForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.run(4), side, seed)
    return {**out, "pixel_values_videos": torch.stack(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _common.dense_row(inputs, samples, i, "pixel_values_videos")
