"""Ovis 2: each frame of a video comes as an image, a mixture of visual words."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames

NAME, MIN_VERSION, ROWS = "ovis2", (4, 57), _frames.RUNS


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 56, "vocab_size": 40, "hidden_stride": 2,
    }  # fmt: skip
    config = Ovis2Config(
        text_config=common.text_config(layers, model_type="qwen2", **common.rope()), vision_config=vision,
        image_token_id=common.IMAGE, vocab_size=256, hidden_size=64, tie_word_embeddings=False,
        visual_indicator_token_ids=[common.START, common.END, common.VIDEO_START, common.VIDEO_END, common.AUDIO],
    )  # fmt: skip
    return common.build(Ovis2ForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28), side, seed)
    return {**out, "pixel_values": torch.cat(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values")
