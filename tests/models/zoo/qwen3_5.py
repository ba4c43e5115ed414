"""Qwen3.5: gated delta layers between the attention layers."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "qwen3_5", (5, 17), _common.ROWS
MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, stamps=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = _common.text_config(
        layers, head_dim=32, layer_types=_grids.hybrid(layers),
        linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        **_common.rope(mrope_section=[1, 2, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
    )  # fmt: skip
    config = Qwen3_5Config(text_config=text, vision_config=_grids.qwen3_vision(), **_grids.VISION_IDS)
    return _common.build(Qwen3_5ForConditionalGeneration, config, attention, seed)
