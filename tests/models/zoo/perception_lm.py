"""PerceptionLM: videos ``[V, T, C, H, W]``; a CLIP tower stands in for the one of timm."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION, ROWS = "perception_lm", (5, 23), _frames.DENSE


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration

    config = PerceptionLMConfig(
        text_config={"model_type": "llama", **_common.text_config(layers)},
        vision_config=_frames.clip_tower(model_args={"embed_dim": 32}),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=_common.IMAGE,
        video_token_id=_common.VIDEO,
    )
    return _common.build(PerceptionLMForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.run(4), side, seed)
    return {**out, "pixel_values_videos": torch.stack(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _common.dense_row(inputs, samples, i, "pixel_values_videos")
