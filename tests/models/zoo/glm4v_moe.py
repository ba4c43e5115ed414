"""GLM-4.5V."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "glm4v_moe", (4, 57), _common.ROWS
BEAMS = False  # the unreduced model loses the features of videos
batch, row = partial(_common.grid_batch, **_grids.GLM_BATCH), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    text = _common.text_config(
        layers, head_dim=16, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, **_common.rope(mrope_section=[1, 2, 1], partial_rotary_factor=0.5),
    )  # fmt: skip
    config = Glm4vMoeConfig(text_config=text, vision_config=_grids.glm_vision(), **_grids.GLM_IDS)
    return _common.build(Glm4vMoeForConditionalGeneration, config, attention, seed)
