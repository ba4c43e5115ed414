"""Cosmos3 Edge."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "cosmos3_edge", (5, 17), _common.ROWS
MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, stamps=True, temporal=1, last=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Cosmos3EdgeConfig, Cosmos3EdgeForConditionalGeneration

    text = _common.text_config(layers, head_dim=16, **_common.rope(**_grids.SECTION))
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
        "num_patches": 64, "spatial_merge_size": 2,
    }  # fmt: skip
    config = Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=64, **_grids.VISION_IDS)
    return _common.build(Cosmos3EdgeForConditionalGeneration, config, attention, seed)
