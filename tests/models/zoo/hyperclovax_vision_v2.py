"""HyperCLOVA X Vision V2: the vision tower of Qwen2.5-VL before a model with 1-D positions."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "hyperclovax_vision_v2", (5, 23), common.ROWS
batch, row = partial(common.grid_batch, types=False), common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration

    text = common.text_config(layers, model_type="hyperclovax", **common.rope())
    vision = {
        "model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = HyperCLOVAXVisionV2Config(text_config=text, vision_config=vision, **common.ids())
    return common.build(HyperCLOVAXVisionV2ForConditionalGeneration, config, attention, seed)
