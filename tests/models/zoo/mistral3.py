"""Mistral 3: each frame of a video comes as an image of its own size."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames

NAME, MIN_VERSION, ROWS = "mistral3", (4, 57), _frames.RUNS


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = common.text_config(layers, model_type="mistral", head_dim=16, sliding_window=None, **common.rope())
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "patch_size": 14, "image_size": 112, **common.rope(),
    }  # fmt: skip
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=common.IMAGE, tie_word_embeddings=False
    )
    return common.build(Mistral3ForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28), side, seed)
    pixels = torch.cat(_frames.pixels(samples))
    return {**out, "pixel_values": pixels, "image_sizes": torch.full((len(pixels), 2), 56)}


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values", "image_sizes")
