"""Muse Spark: Muse Glimmer with a mixture of experts and an audio tower."""

from typing import Any

from tests.models.zoo import _common as common
from tests.models.zoo import muse_glimmer

NAME, MIN_VERSION, ROWS = "muse_spark", (5, 23), common.ROWS
batch, row = muse_glimmer.batch, muse_glimmer.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import MuseSparkConfig, MuseSparkForConditionalGeneration

    text = common.text_config(
        layers, head_dim=16, sliding_window=24, moe_intermediate_size=32, moe_hidden_size=32, num_local_experts=4,
        num_experts_per_tok=2, **common.rope(),
    )  # fmt: skip
    audio = {
        "patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2,
        "out_hidden_size": 64,
    }  # fmt: skip
    config = MuseSparkConfig(
        text_config=text, vision_config=muse_glimmer.VISION, audio_config=audio, out_hidden_size=128,
        projector_hidden_size=64, audio_token_id=common.AUDIO, **common.ids(),
    )  # fmt: skip
    return common.build(MuseSparkForConditionalGeneration, config, attention, seed)
