"""GLM-5 next: linear attention, an indexer over compressed keys, four residual streams."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "glm5_next", (5, 17), _common.ROWS
BEAMS = False  # the unreduced model loses the features of videos
MIXED = _common.tiny.MIXED
REFUSED = {"attn": "expected attn at an attention layer"}
batch, row = partial(_common.grid_batch, **_grids.GLM_BATCH), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration

    text = _common.text_config(
        layers, layer_types=_grids.hybrid(layers),
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1), num_key_value_heads=4, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=32, v_head_dim=16, qk_nope_head_dim=16,
        index_topk=16, index_head_dim=16, index_n_heads=8, index_kpool=4, linear_head_dim=16, linear_num_heads=4,
        hc_mult=2, hc_sinkhorn_iters=3,
    )  # fmt: skip
    vision = _grids.glm_vision(projection_intermediate_size=64)
    config = Glm5NextConfig(text_config=text, vision_config=vision, **_grids.GLM_IDS)
    return _common.build(Glm5NextForConditionalGeneration, config, attention, seed)
