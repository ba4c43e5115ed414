"""Cohere Compass: sliding layers and deepstack features."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "cohere_compass", (5, 17), _common.ROWS
MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, stamps=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import CohereCompassConfig, CohereCompassForConditionalGeneration

    rope = _common.rope(**_grids.SECTION, mrope_interleaved=True)["rope_parameters"]
    kinds = _grids.hybrid(layers, "sliding_attention")
    text = _common.text_config(
        layers, layer_types=kinds, sliding_window=4096, rope_parameters={kind: dict(rope) for kind in kinds}
    )
    config = CohereCompassConfig(text_config=text, vision_config=_grids.qwen3_vision(True), **_grids.VISION_IDS)
    return _common.build(CohereCompassForConditionalGeneration, config, attention, seed)
