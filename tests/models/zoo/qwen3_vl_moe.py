"""Qwen3-VL with experts: deepstack features."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "qwen3_vl_moe", (4, 57), _common.ROWS
MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, stamps=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = _common.text_config(
        layers, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        **_common.rope(**_grids.SECTION, mrope_interleaved=True),
    )  # fmt: skip
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_grids.qwen3_vision(True), **_grids.VISION_IDS)
    return _common.build(Qwen3VLMoeForConditionalGeneration, config, attention, seed)
