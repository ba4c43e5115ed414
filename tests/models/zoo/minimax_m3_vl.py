"""MiniMax M3 VL: a mixture of experts with block-sparse attention."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "minimax_m3_vl", (5, 23), common.ROWS
batch, row = partial(common.grid_batch, types=False), common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0, **text_options: Any) -> Any:
    from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig

    text = common.text_config(
        layers, head_dim=16, dense_intermediate_size=96, shared_intermediate_size=32, num_experts_per_tok=2,
        num_local_experts=4, rotary_dim=8, mlp_layer_types=["dense" if i == 0 else "sparse" for i in range(layers)],
        **{"layer_types": ["full_attention"] * layers, **common.rope(), **text_options},
    )  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 112, "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4},
    }  # fmt: skip
    config = MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, projector_hidden_size=64,
        image_token_index=common.IMAGE, video_token_index=common.VIDEO,
    )  # fmt: skip
    return common.build(MiniMaxM3SparseForConditionalGeneration, config, attention, seed)
