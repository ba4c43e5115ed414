"""GLM-4.1V."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "glm4v", (4, 57), _common.ROWS
BEAMS = False  # the unreduced model loses the features of videos
batch, row = partial(_common.grid_batch, **_grids.GLM_BATCH), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    text = _common.text_config(layers, **_common.rope(**_grids.SECTION, partial_rotary_factor=1.0))
    config = Glm4vConfig(text_config=text, vision_config=_grids.glm_vision(), **_grids.GLM_IDS)
    return _common.build(Glm4vForConditionalGeneration, config, attention, seed)
