"""The vision transformer that is trained here, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.accuracy.data import SETS

WEIGHTS = Path(__file__).parent / "weights"


def config(name: str, **changed: Any) -> Any:
    """0.2 million parameters, patches of 4x4 pixels and a class token, 6 blocks, for a key of ``SETS``."""
    from transformers import ViTConfig

    source = SETS[name]
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": source.side,
        "num_channels": len(source.mean),
        "patch_size": 4,
        "num_labels": len(source.classes),
    }
    return ViTConfig(**{**sizes, **changed})


def build(name: str, seed: int = 0, **changed: Any) -> Any:
    """A model with random weights."""
    from transformers import ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(config(name, **changed))


def save(model: Any, path: Path, half: bool = True) -> None:
    """Write the weights, by default in fp16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.float16 if half else v.dtype).contiguous() for k, v in model.state_dict().items()}
    save_file(state, path)


def load(name: str, path: Path, **changed: Any) -> Any:
    """The fp32 model of a checkpoint, ready to be evaluated."""
    model = build(name, **changed)
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()
