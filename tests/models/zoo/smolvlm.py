"""SmolVLM: each frame of a video comes as an image, rows are padded with empty images."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames

NAME, MIN_VERSION, ROWS = "smolvlm", (4, 57), _frames.RUNS


def config(layers: int) -> dict[str, Any]:
    """Arguments of a config."""
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 56,
    }  # fmt: skip
    text = common.text_config(layers, model_type="llama", **common.rope())
    return {"text_config": text, "vision_config": vision, "scale_factor": 2, "image_token_id": common.IMAGE}


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return common.build(SmolVLMForConditionalGeneration, SmolVLMConfig(**config(layers)), attention, seed)


def _spoken(frames: int, side: int, g: torch.Generator) -> list[int]:
    """A sentence in front of the video, and the time of each frame in front of its tokens."""
    return [*common.words(8, g), *_frames.runs(28)(frames, side, g)]


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _spoken, side, seed)
    clips = iter(_frames.pixels(samples))
    rows = [torch.cat([next(clips) for _ in row]) for row in samples]
    most = max(map(len, rows))
    return {
        **out,
        "pixel_values": torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in rows]),
    }


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    count = sum(n for _, n, _ in samples[i])
    return {**common.alone(inputs, i), "pixel_values": inputs["pixel_values"][i : i + 1, :count]}
