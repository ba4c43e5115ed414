"""Kimi K2.5: frames are averaged before the language model, so a video chunk has one frame of tokens."""

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common

NAME, MIN_VERSION = "kimi_k25", (5, 17)
#: Chunks of one frame: `get_image_features` splits the pooled features by the sizes of unpooled grids.
ROWS: list[list[Clip]] = [[("video", 1, 112)], [("video", 1, 56), ("video", 1, 84)], [("video", 1, 56)]]


def _images(out: dict[str, Tensor]) -> dict[str, Tensor]:
    if "pixel_values_videos" in out:
        out["pixel_values_videos"] = out["pixel_values_videos"].view(-1, 3, 14, 14)
    return out


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    return _images(common.grid_batch(samples, side, seed, temporal=1, types=False))


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    return common.grid_row(inputs, samples, i)


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    text = common.text_config(
        layers, model_type="deepseek_v3", num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, rope_interleave=True, **common.rope(),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "pos_emb_height": 8, "pos_emb_width": 8,
    }  # fmt: skip
    config = Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False, **common.ids()
    )
    model = common.build(Kimi_K25ForConditionalGeneration, config, attention, seed)
    with torch.no_grad():
        model.model.vision_tower.patch_embed.pos_emb.position_embeddings.normal_()
    return model
