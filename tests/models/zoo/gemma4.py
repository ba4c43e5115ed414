"""Gemma 4: patches of all frames in one tensor, a run of tokens per frame that see each other in sliding layers."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION = "gemma4", (5, 23)
ROWS: list[list[_common.Clip]] = [[("video", 2, 112)], [("video", 2, 56), ("video", 3, 56)], [("video", 3, 56)]]


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4Config(
        text_config=_common.text_config(
            layers, head_dim=16, global_head_dim=16, sliding_window=16,
            layer_types=[kinds[i % 2] for i in range(layers)],
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=256, use_bidirectional_attention="vision",
        ),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14, "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        image_token_id=_common.IMAGE, video_token_id=_common.VIDEO, audio_token_id=_common.AUDIO,
        boi_token_id=_common.START, eoi_token_id=_common.END,
    )  # fmt: skip
    return _common.build(Gemma4ForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28, _common.VIDEO), side, seed)
    values, places = _frames.patches(_frames.pixels(samples), 14)
    out["mm_token_type_ids"] = (out["input_ids"] == _common.VIDEO).int() * 2
    counts = torch.tensor([n for clips in samples for _, n, _ in clips])
    return {**out, "pixel_values_videos": values, "video_position_ids": places, "num_frames_per_video": counts}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    names = ("pixel_values_videos", "video_position_ids")
    return _frames.per_frame_row(inputs, samples, i, *names, per_video=("num_frames_per_video",))
