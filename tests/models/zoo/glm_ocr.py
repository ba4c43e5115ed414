"""GLM-OCR."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "glm_ocr", (5, 17), _common.ROWS
BEAMS = False  # the unreduced model loses the features of videos
batch, row = partial(_common.grid_batch, **_grids.GLM_BATCH), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    text = _common.text_config(layers, head_dim=16, **_common.rope(**_grids.SECTION, partial_rotary_factor=1.0))
    config = GlmOcrConfig(text_config=text, vision_config=_grids.glm_vision(), **_grids.GLM_IDS)
    return _common.build(GlmOcrForConditionalGeneration, config, attention, seed)
