"""The text config of the tiny hybrid Mamba models."""

from __future__ import annotations

from typing import Any

from tests.models.zoo import _common


def text(layers: int) -> dict[str, Any]:
    """Text config; layers alternate between Mamba, attention and MLP."""
    kinds = ["linear_attention", "full_attention", "mlp"]
    return {
        **{k: v for k, v in _common.text_config(layers).items() if k != "num_hidden_layers"},
        "head_dim": 16, "layers_block_type": [kinds[i % 3] for i in range(layers)], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "expand": 1,
    }  # fmt: skip
