"""Gemma 4 without a vision tower: merged patches go through one dense layer."""

from typing import Any

from torch import Tensor

from tests.models.zoo import _common, _frames, gemma4

NAME, MIN_VERSION, ROWS, row = "gemma4_unified", (5, 23), gemma4.ROWS, gemma4.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4UnifiedConfig(
        text_config=_common.text_config(
            layers, head_dim=16, global_head_dim=16, sliding_window=16,
            layer_types=[kinds[i % 2] for i in range(layers)],
        ),
        vision_config={
            "patch_size": 14, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        image_token_id=_common.IMAGE, video_token_id=_common.VIDEO, audio_token_id=_common.AUDIO,
        boi_token_id=_common.START, eoi_token_id=_common.END,
    )  # fmt: skip
    return _common.build(Gemma4UnifiedForConditionalGeneration, config, attention, seed)


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    values, places = _frames.patches(_frames.pixels(samples), 28)
    out = gemma4.batch(samples, side, seed)
    return {**out, "pixel_values_videos": values, "video_position_ids": places}
