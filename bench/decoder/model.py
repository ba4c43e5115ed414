"""The model of these measurements, its inputs, and a reduced prefill written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNIFORM = "uni_7_0.5-uni_14_0.25"
ATTENTION = "attn_14_0.3"
VISUAL = "uniform:ratio=0.5"
VISUAL_ID = 251
SCORED = 23040  # tokens


@dataclass(frozen=True)
class Size:
    """What is built and how often it runs."""

    layers: int = 28
    width: int = 512
    intermediate: int = 2048
    heads: int = 8
    kv_heads: int = 2
    visual: int = 6400
    text: int = 512
    pairs: int = 5
    steps: int = 60
    calls: int = 30
    scored: int = SCORED
    scored_width: int = 3584
    tiny: bool = False


TINY = Size(28, 64, 64, 4, 2, 128, 32, 2, 4, 3, 256, 64, tiny=True)
# Widths of Qwen2-7B, and of Qwen2-1.5B for smaller cards.
GPU = Size(28, 3584, 18944, 28, 4, 6400, 512, 15, 60, 40)
NARROW = {"width": 1536, "intermediate": 8960, "heads": 12, "kv_heads": 2}


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2 with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=256, hidden_size=size.width, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=65536,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model: Any) -> Any:
    """The same weights in another model object."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def prompt(size: Size, device: torch.device) -> dict[str, Tensor]:
    """One row: a little text, a video, a question."""
    words = torch.randint(5, 240, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = torch.tensor([[*words[:8], *[VISUAL_ID] * size.visual, *words[8:]]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_only(size: Size, device: torch.device) -> dict[str, Tensor]:
    """One row of text."""
    ids = torch.randint(5, 240, (1, size.text), generator=torch.Generator().manual_seed(2)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_hand(model: Any, ids: Tensor, kept: dict[int, Tensor]) -> Callable[[], Tensor]:
    """A prefill that gathers columns ``kept[n]`` before layer n, written as a loop over the layers."""
    from transformers import DynamicCache

    decoder = model.model
    position = torch.arange(ids.shape[1], device=ids.device)[None]

    def run() -> Tensor:
        hidden = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(hidden, position)
        cache = DynamicCache()
        for i, layer in enumerate(decoder.layers):
            if i in kept:
                hidden = hidden[:, kept[i]]
                rotary = tuple(part[:, kept[i]] for part in rotary)
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return model.lm_head(decoder.norm(hidden[:, -1:]))

    return run
