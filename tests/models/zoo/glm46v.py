"""GLM-4.6V."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "glm46v", (5, 17), _common.ROWS
BEAMS = False  # the unreduced model loses the features of videos
batch, row = partial(_common.grid_batch, **_grids.GLM_BATCH), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Glm46VConfig, Glm46VForConditionalGeneration

    text = _common.text_config(
        layers, model_type="glm4v_text", **_common.rope(**_grids.SECTION, partial_rotary_factor=1.0)
    )
    config = Glm46VConfig(
        text_config=text, vision_config=_grids.glm_vision(model_type="glm4v_vision"), **_grids.GLM_IDS
    )
    return _common.build(Glm46VForConditionalGeneration, config, attention, seed)
