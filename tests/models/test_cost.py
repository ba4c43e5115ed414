"""What layers are said to cost is what torch counts when they run, and what caches hold."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from vidtok.models.cost import LayerCost, costs

SMALL = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "Qwen2": {},
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma3Text": {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
    },
    "Qwen3Moe": {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "num_key_value_heads": 4, "head_dim": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "q_lora_rank": 24, "kv_lora_rank": 20, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
}  # fmt: skip


def make(name, **options):
    """A random model of this architecture, without head."""
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS.get(name, {}), **options})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    cls = f"{name}Model" if hasattr(transformers, f"{name}Model") else name
    return getattr(transformers, cls)(config).eval()


def counted(model, tokens):
    """Operations of matrix products and convolutions that torch counts in the layers."""
    ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(input_ids=ids, use_cache=True).past_key_values
    total = sum(counter.get_flop_counts()["Global"].values())
    return total, cache


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name):
    model, n = make(name), 24
    total, cache = counted(model, n)
    found = costs(model)
    assert len(found) == 4
    # Eager attention computes every pair, ours counts the causal ones.
    every = sum(c.flops(n) + 2 * (c.key_width + c.value_width) * (n * n - c.pairs(n)) for c in found)
    rotary = total - every
    # What remains are products of positions and frequencies, made once for all layers.
    assert 0 <= rotary <= 4 * 2 * n * 16
    for cost, layer in zip(found, cache.layers):
        held = layer.keys.numel() + layer.values.numel()
        assert cost.kv_bytes(n) == 4 * held
        assert cost.kv_columns(n) == layer.keys.shape[2]


def test_a_hybrid_has_states_instead_of_keys():
    pytest.importorskip("transformers.models.nemotron_h")
    model = make(
        "NemotronH", layers_block_type=["mamba", "moe", "attention", "mlp"], mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8, n_groups=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24, conv_kernel=4, chunk_size=8,
    )  # fmt: skip
    mamba, moe, attention, mlp = costs(model)
    assert [c.kv_width > 0 for c in (mamba, moe, attention, mlp)] == [False, False, True, False]
    assert mamba.state == 4 * 16 * 8
    assert mlp.weights == 2 * 48 * 80
    up = model.layers[0].mixer.in_proj.weight.numel() + model.layers[0].mixer.out_proj.weight.numel()
    assert mamba.weights == up + model.layers[0].mixer.conv1d.weight.numel()
    # A router, two of four experts, one shared expert.
    assert moe.weights == 4 * 48 + 2 * (2 * 48 * 24) + 2 * 48 * 24
    assert mamba.flops(10) == 2 * 10 * mamba.weights + 6 * 10 * mamba.state


@pytest.mark.parametrize("window", [None, 1, 5, 8, 40])
def test_pairs_are_those_of_the_mask(window):
    cost = LayerCost("sliding_attention", 0, 1, 1, 2, window)
    for tokens, past in ((1, 0), (12, 0), (1, 9), (7, 3), (3, 7), (5, 20)):
        query = torch.arange(past, past + tokens)[:, None]
        key = torch.arange(past + tokens)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        assert cost.pairs(tokens, past) == int(seen.sum())


def test_a_model_without_layers_costs_nothing_known():
    assert costs(torch.nn.Linear(2, 2)) == []
