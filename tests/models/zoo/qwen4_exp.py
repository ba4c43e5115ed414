"""Qwen4 experimental: per-layer embeddings of token n-grams, four residual streams, an indexer."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "qwen4_exp", (5, 23), _common.ROWS
MIXED = _common.tiny.MIXED
REFUSED = {"attn": "expected attn at an attention layer"}
batch, row = partial(_common.grid_batch, stamps=True), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration

    kinds = _grids.hybrid(layers)
    text = _common.text_config(
        layers, head_dim=32, layer_types=kinds, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        num_experts=4, num_experts_per_tok=2, hc_count=2, hc_lowrank=8,
        ple_layer_ids=[1, 3][: layers // 2], ple_embed_dim=32,
        ngram_vocab_size_base=50, make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=1,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4,
        **_common.rope(mrope_section=[1, 2, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
    )  # fmt: skip
    text.pop("intermediate_size")
    config = Qwen4ExpConfig(text_config=text, vision_config=_grids.qwen3_vision(), **_grids.VISION_IDS)
    return _common.build(Qwen4ExpForConditionalGeneration, config, attention, seed)
