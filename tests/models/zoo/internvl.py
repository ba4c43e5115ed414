"""InternVL: each frame of a video comes as an image."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION, ROWS = "internvl", (4, 57), _frames.RUNS


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_common.text_config(layers)},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14, "image_size": 56, "layer_scale_init_value": 1.0,
        },
        image_token_id=_common.IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return _common.build(InternVLForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28), side, seed)
    return {**out, "pixel_values": torch.cat(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values")
