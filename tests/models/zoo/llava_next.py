"""LLaVA-NeXT: each frame of a video comes as an image of one tile and a newline token."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames

NAME, MIN_VERSION, ROWS = "llava_next", (4, 57), _frames.RUNS


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        text_config=common.text_config(layers, model_type="llama", **common.rope()),
        vision_config=_frames.clip_tower(), image_token_index=common.IMAGE, image_grid_pinpoints=[[56, 56]],
        vision_feature_layer=-1,
    )  # fmt: skip
    return common.build(LlavaNextForConditionalGeneration, config, attention, seed)


def _frames_of_tiles(frames: int, side: int, g: torch.Generator) -> list[int]:
    # The whole frame and one tile of 4×4 tokens each, and a newline after each row of the tile.
    per = [common.START, *[common.IMAGE] * (16 + 4 * 5), common.END]
    return [t for _ in range(frames) for t in (*common.words(2, g), *per)]


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames_of_tiles, side, seed)
    pixels = torch.cat(_frames.pixels(samples))
    sizes = torch.full((len(pixels), 2), 56)
    return {**out, "pixel_values": torch.stack([pixels, pixels], 1), "image_sizes": sizes}


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values", "image_sizes")
