"""EXAONE 4.5: 1-D positions, sliding and full attention."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "exaone4_5", (5, 17), common.ROWS
batch, row = partial(common.grid_batch, types=False), common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    text = common.text_config(
        layers, model_type="exaone4", sliding_window=24, sliding_window_pattern=2, layer_types=kinds, **common.rope()
    )
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_key_value_heads": 1,
        "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Exaone4_5_Config(text_config=text, vision_config=vision, **common.ids())
    return common.build(Exaone4_5_ForConditionalGeneration, config, attention, seed)
