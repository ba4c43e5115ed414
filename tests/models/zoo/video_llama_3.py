"""VideoLLaMA 3: a merge size per video."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "video_llama_3", (5, 17), common.ROWS


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = common.grid_batch(samples, side, seed, temporal=1, types=False)
    for kind in ("video", "image"):
        if f"{kind}_grid_thw" in out:
            out[f"{kind}_merge_sizes"] = torch.full((len(out[f"{kind}_grid_thw"]),), 2)
    return out


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    out = common.grid_row(inputs, samples, i)
    for kind in ("video", "image"):
        if f"{kind}_grid_thw" in out:
            out[f"{kind}_merge_sizes"] = torch.full((len(out[f"{kind}_grid_thw"]),), 2)
    return out


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    text = common.text_config(layers, model_type="qwen2", **common.rope())
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
    }  # fmt: skip
    config = VideoLlama3Config(text_config=text, vision_config=vision, **common.ids())
    return common.build(VideoLlama3ForConditionalGeneration, config, attention, seed)
