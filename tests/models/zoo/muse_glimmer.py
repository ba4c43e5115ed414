"""Muse Glimmer: sliding layers with rotary positions, full layers without."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "muse_glimmer", (5, 17), common.ROWS
batch, row = partial(common.grid_batch, types=False, order=1), common.grid_row
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pos_emb_height": 8, "pos_emb_width": 8, "merge_size": 2,
}  # fmt: skip


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

    text = common.text_config(layers, head_dim=16, sliding_window=24, **common.rope())
    config = MuseGlimmerConfig(
        text_config=text, vision_config=VISION, out_hidden_size=128, projector_hidden_size=64, **common.ids()
    )
    return common.build(MuseGlimmerForConditionalGeneration, config, attention, seed)
