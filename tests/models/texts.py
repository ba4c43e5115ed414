"""Plain language models, and rows of text in which some columns count as videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.zoo import _common
from vidtok.models.report import Unit
from vidtok.models.tokens import Tokens

# Kinds of layers that differ in whether they rotate.
KINDS: dict[str, Any] = {
    "Cohere2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 64},
    "Exaone4": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 64},
    "NemotronH": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "expand": 1,
    },
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
}


def plain(name: str, layers: int = 3, attention: str = "sdpa", **options: Any) -> Any:
    """A tiny plain language model."""
    import transformers

    options = {**_common.text_config(layers), "head_dim": 16, **KINDS.get(name, {}), **options}
    if name == "NemotronH":
        del options["num_hidden_layers"]
    config = getattr(transformers, f"{name}Config")(**options)
    return _common.build(getattr(transformers, f"{name}ForCausalLM"), config, attention)


def ragged() -> tuple[Tensor, Tokens, Tensor]:
    """Three left padded rows: a video in two runs, two videos, text alone; ids, tokens, labels."""
    length = 40
    ids = torch.randint(5, 240, (3, length), generator=torch.Generator().manual_seed(7))
    unit = torch.full((3, length), -1, dtype=torch.int32)
    unit[0, 12:20], unit[0, 22:30], unit[1, 5:15], unit[1, 20:26] = 0, 0, 1, 2
    frame = torch.where(unit >= 0, torch.arange(length, dtype=torch.int32) // 4, -1).int()
    valid = torch.ones(3, length, dtype=torch.bool)
    valid[0, :8], valid[2, :20] = False, False
    labels = torch.full((3, length), -100)
    labels[:, 35:] = ids[:, 35:]
    return ids, Tokens(unit, frame, [Unit("video", r, (4, 2, 2)) for r in (0, 1, 1)], valid), labels
