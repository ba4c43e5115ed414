"""Nemotron-H-Omni: a hybrid Mamba decoder; frames come as images, packed by patches."""

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common, _frames, _nemotron_h

NAME, MIN_VERSION = "nemotron_h_omni", (5, 23)
ROWS: list[list[_common.Clip]] = [[("video", 3, 56)], [("video", 2, 56), ("video", 2, 56)], [("video", 2, 84)]]


def make(attention: str = "sdpa", layers: int = 3, seed: int = 0) -> Any:
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config={"model_type": "nemotron_h", **_nemotron_h.text(layers)},
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": 14,
            "image_size": 56, "max_img_size": 112, "num_cls_tokens": 1, "num_registers": 1, "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
        audio_config=None, vision_hidden_size=32, projector_hidden_size=64, force_image_size=56,
        image_token_id=_common.IMAGE, video_token_id=_common.VIDEO, audio_token_id=_common.AUDIO,
    )  # fmt: skip
    return _common.build(NemotronH_Omni_Reasoning_V3, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28), side, seed)
    frames = [f for x in _frames.pixels(samples) for f in x]
    sizes = [f.shape[-1] // 14 for f in frames]
    patches = [f.reshape(3, n, 14, n, 14).permute(1, 3, 0, 2, 4).reshape(n * n, -1) for f, n in zip(frames, sizes)]
    return {**out, "pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor([[n, n] for n in sizes])}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    out = _frames.per_frame_row(inputs, samples, i, "image_grid_hw")
    sizes = inputs["image_grid_hw"].prod(-1).tolist()
    first = sum(n for clips in samples[:i] for _, n, _ in clips)
    start = sum(sizes[:first])
    return {
        **out,
        "pixel_values": inputs["pixel_values"][start : start + sum(sizes[first : first + len(out["image_grid_hw"])])],
    }
