"""Plain language models, and rows in which some tokens count as visual."""

from __future__ import annotations

from functools import cache as memo
from typing import Any

import torch
from torch import Tensor

FROM, TO = 200, 232  # tokens from FROM to TO - 1 are visual


def make(kind: str = "qwen2", attention: str = "sdpa", layers: int = 4, seed: int = 0, **options: Any) -> Any:
    """A sharpened random language model with head."""
    import transformers as t

    torch.manual_seed(seed)
    config = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, **options,
    }  # fmt: skip
    if kind == "nemotron_h":
        types = ["mamba", "mlp", "attention", "mamba", "attention", "mlp"]
        config |= {
            "layers_block_type": types, "num_hidden_layers": len(types), "mamba_num_heads": 4, "mamba_head_dim": 16,
            "ssm_state_size": 8, "n_groups": 2, "head_dim": 16, "chunk_size": 16,
        }  # fmt: skip
    names = {
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"), "mistral": ("MistralConfig", "MistralForCausalLM"),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM"),
    }  # fmt: skip
    config_class, model_class = (getattr(t, name) for name in names[kind])
    made = config_class(**config)
    made._attn_implementation = attention
    model = model_class(made).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(6.0 if "q_proj" in name or "k_proj" in name else 2.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def rows(counts: list[list[int]], seed: int = 3) -> list[list[int]]:
    """Rows of text with runs of so many visual tokens."""
    out = []
    for i, runs in enumerate(counts):
        g = torch.Generator().manual_seed(seed + i)

        def draw(low: int, high: int, n: int, g: torch.Generator = g) -> list[int]:
            return torch.randint(low, high, (n,), generator=g).tolist()

        row = draw(5, 200, 3)
        for n in runs:
            row += draw(FROM, TO, n) + draw(5, 200, 2)
        out.append(row + draw(5, 200, 3 + 2 * i))
    return out


def batch(given: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """Rows with padding at one side."""
    length = max(map(len, given))
    pads = [length - len(r) for r in given]
    left = side == "left"
    ids = [[0] * n + r if left else r + [0] * n for n, r in zip(pads, given)]
    mask = [[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for n, r in zip(pads, given)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def visual(given: Tensor) -> Tensor:
    """bool: which ids are visual."""
    return (given >= FROM) & (given < TO)


def reference(model: Any, handle: Any, prompt: list[int], more: list[int]) -> Tensor:
    """Logits of one row without padding and cache, from the last prompt token on; that token asks."""
    ids = torch.tensor([prompt + more])
    labels = torch.tensor([[-100] * len(prompt) + more])
    with handle.tokens(visual(ids)):
        logits: Tensor = model(input_ids=ids, labels=labels, use_cache=False).logits[0]
    return logits[-len(more) - 1 :]


def answer(
    model: Any, handle: Any, given: list[list[int]], steps: int = 3, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """Prefill, then ``steps`` given tokens one by one with a cache: logits ``[B, steps + 1, V]``, tokens, cache."""
    more = torch.randint(5, FROM, (len(given), steps), generator=torch.Generator().manual_seed(99))
    inputs = batch(given)
    mask = inputs["attention_mask"]
    with handle.tokens(visual(inputs["input_ids"])):
        out = model(**inputs, **positions(model, mask), use_cache=True, **options)
        logits = [out.logits[:, -1]]
        for i in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            number = {name: value[:, -1:] for name, value in positions(model, mask).items()}
            out = model(
                input_ids=more[:, i : i + 1], attention_mask=mask, past_key_values=out.past_key_values, **number
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), more, out.past_key_values


def positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Position ids that count real tokens only."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def lengths(cache: Any) -> list[int | None]:
    """Keys that each layer of a cache holds."""
    found = [getattr(layer, "keys", None) for layer in cache.layers]
    return [None if keys is None else keys.shape[2] for keys in found]


GIVEN = rows([[24], [12, 9], [17]])
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 12},
    "mixed": {
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "nemotron_h": {},
}


@memo
def get(kind: str, attention: str = "sdpa") -> Any:
    """A model of ``OPTIONS``, made once; tests leave it as it was."""
    return make("qwen2" if kind == "mixed" else kind, attention, **OPTIONS[kind])
