"""Gemma 3: frames as images, whose tokens see each other in both directions."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION, ROWS = "gemma3", (5, 17), _frames.RUNS


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=_common.text_config(
            layers, head_dim=16, sliding_window=16, layer_types=[kinds[i % 2] for i in range(layers)]
        ),
        vision_config=_frames.siglip(),
        mm_tokens_per_image=4,
        image_token_id=_common.IMAGE,
        boi_token_id=_common.START,
        eoi_token_id=_common.END,
    )
    model = _common.build(Gemma3ForConditionalGeneration, config, attention, seed)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28), side, seed)
    out["token_type_ids"] = (out["input_ids"] == _common.IMAGE).long()
    return {**out, "pixel_values": torch.cat(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values")
