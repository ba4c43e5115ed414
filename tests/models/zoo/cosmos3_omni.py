"""Cosmos3 Omni: the tower and the decoder of Qwen3-VL."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "cosmos3_omni", (5, 17), _common.ROWS
MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, stamps=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration

    text = _common.text_config(
        layers, model_type="qwen3_vl_text", head_dim=16, **_common.rope(**_grids.SECTION, mrope_interleaved=True)
    )
    vision = {"model_type": "qwen3_vl_vision", **_grids.qwen3_vision(True)}
    config = Cosmos3OmniConfig(text_config=text, vision_config=vision, **_grids.VISION_IDS)
    return _common.build(Cosmos3OmniForConditionalGeneration, config, attention, seed)
