"""ERNIE 4.5 VL: experts of their own for visual tokens, two frames in a token."""

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "ernie4_5_vl_moe", (5, 17), _common.ROWS
MIXED = _common.tiny.MIXED
row = _common.grid_row


def batch(samples: list, side: str = "left", seed: int = 10) -> dict:
    inputs = _common.grid_batch(samples, side, seed, temporal=1, over=2)
    inputs["moe_mm_token_type_ids"] = (inputs["mm_token_type_ids"] > 0).int()
    return inputs


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text = _common.text_config(
        layers, moe_intermediate_size=[32, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
        **_common.rope(mrope_section=[3, 3, 2]),
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_merge_size": 2,
    }  # fmt: skip
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **_grids.GLM_IDS)
    return _common.build(Ernie4_5_VLMoeForConditionalGeneration, config, attention, seed)
