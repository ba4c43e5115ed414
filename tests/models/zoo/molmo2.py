"""Molmo 2: visual tokens see each other both ways, by masks that the base model makes."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames
from tests.models.zoo._common import END, IMAGE, START, VIDEO_END, VIDEO_START

NAME, MIN_VERSION, ROWS = "molmo2", (5, 23), _frames.RUNS
SIDE, POOL = 4, 2


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    text = common.text_config(layers, head_dim=16, vocab_size=256, additional_vocab_size=0, **common.rope())
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": [56, 56], "patch_size": 14,
        **heads,
    }  # fmt: skip
    adapter = {
        "hidden_size": 32, "vision_feature_layer": [1, 0], "intermediate_size": 64, "text_hidden_size": 64, **heads,
    }  # fmt: skip
    config = Molmo2Config(
        text_config=text, vision_config=vision, adapter_config=adapter, image_patch_id=IMAGE,
        image_start_token_id=VIDEO_START, image_end_token_id=VIDEO_END, frame_start_token_id=START,
        frame_end_token_id=END, low_res_image_start_token_id=common.AUDIO,
    )  # fmt: skip
    model = common.build(Molmo2ForConditionalGeneration, config, attention, seed)
    with torch.no_grad():
        for p in model.model.multi_modal_projector.parameters():
            p.mul_(4)
    return model


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    per = SIDE // POOL
    out = _frames.text(samples, _frames.runs(56 // per), side, seed)
    out["mm_token_type_ids"] = sum((out["input_ids"] == t).int() for t in (IMAGE, START, END))
    flat = torch.cat(_frames.pixels(samples))
    patches = flat.view(-1, 3, SIDE, 14, SIDE, 14).permute(0, 2, 4, 3, 5, 1).reshape(len(flat), SIDE**2, -1)
    one = torch.arange(SIDE**2).view(per, POOL, per, POOL).transpose(1, 2).reshape(per * per, POOL**2)
    pooling = torch.cat([one + k * SIDE**2 for k in range(len(flat))])
    grids = torch.tensor([[n, per, per] for clips in samples for _, n, _ in clips])
    return {**out, "pixel_values_videos": patches, "video_token_pooling": pooling, "video_grids": grids}


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    out = _frames.per_frame_row(inputs, samples, i, "pixel_values_videos", per_video=("video_grids",))
    tokens = (SIDE // POOL) ** 2 * len(out["pixel_values_videos"])
    return {**out, "video_token_pooling": inputs["video_token_pooling"][:tokens]}
