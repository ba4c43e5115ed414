"""Nemotron-H, a plain language model of Mamba, attention and MLP layers; the caller names the visual tokens."""

from typing import Any

from tests.models.zoo import _common
from tests.models.zoo._plain import ROWS, batch, row

NAME, MIN_VERSION = "nemotron_h", (5, 17)
__all__ = ["MIN_VERSION", "NAME", "ROWS", "batch", "make", "row"]


def text(layers: int) -> dict[str, Any]:
    """Text config; layers alternate between Mamba, attention and MLP."""
    kinds = ["linear_attention", "full_attention", "mlp"]
    return {
        **{k: v for k, v in _common.text_config(layers).items() if k != "num_hidden_layers"},
        "head_dim": 16, "layers_block_type": [kinds[i % 3] for i in range(layers)], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "expand": 1,
    }  # fmt: skip


def sharpen(model: Any) -> Any:
    """Nothing more than for the other families."""
    return model


def make(attention: str = "sdpa", layers: int = 3, seed: int = 0) -> Any:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    return sharpen(_common.build(NemotronHForCausalLM, NemotronHConfig(**text(layers)), attention, seed))
