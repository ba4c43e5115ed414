"""LFM3-VL: convolution, sliding and full attention layers."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "lfm3_vl", (5, 23), common.ROWS
batch, row = partial(common.grid_batch, types=False), common.grid_row


def make(attention: str = "sdpa", layers: int = 3, seed: int = 0) -> Any:
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    kinds = [("conv", "full_attention", "sliding_attention")[i % 3] for i in range(layers)]
    text = common.text_config(
        layers, model_type="lfm3", layer_types=kinds, sliding_window=24, head_dim=16, conv_L_cache=4
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "patch_size": 14, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    config = Lfm3VlConfig(
        text_config=text, vision_config=vision, projector_hidden_size=64, tie_word_embeddings=False, **common.ids()
    )
    return common.build(Lfm3VlForConditionalGeneration, config, attention, seed)
