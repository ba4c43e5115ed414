"""Plain language models with drops inside the decoder, and rows in which some tokens count as visual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import tiny
from vidtok.models import cache as caches
from vidtok.models.cache import State
from vidtok.models.decoder import DecoderHook
from vidtok.models.drop import resolve_drop
from vidtok.models.report import Unit
from vidtok.models.tokens import Tokens

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


class Plain:
    """Puts a :class:`DecoderHook` into a plain model; runs of visual tokens are videos of frames of four tokens."""

    active = True

    def __init__(self, model: Any, drop: Any, position: str = "keep") -> None:
        self.model = model
        self.hook = DecoderHook(model.model, resolve_drop(drop), position)
        self.run: Any = None
        self.labels: Tensor | None = None
        self.handles = [model.model.register_forward_pre_hook(self.pre, with_kwargs=True)]
        self.handles.append(model.model.register_forward_hook(self.post, with_kwargs=True))
        self.handles += [m.register_forward_pre_hook(f, with_kwargs=True) for m, _, f in self.hook.hooks()]

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def pre(self, module: Any, args: Any, kwargs: Any) -> Any:
        """At the input of the decoder."""
        kwargs = dict(kwargs)
        ids = args[0] if args else kwargs.pop("input_ids")
        kwargs.pop("input_ids", None)
        kwargs["inputs_embeds"] = module.get_input_embeddings()(ids)
        given = kwargs.get("attention_mask")
        valid = None
        if isinstance(given, Tensor) and given.dim() == 2:
            valid = given[:, -ids.shape[1] :].bool()
            valid = None if bool(valid.all()) else valid
        cache = kwargs.get("past_key_values")
        self.state = caches.state_of(cache)
        kwargs, self.run = self.hook.begin(tokens_of(ids, valid), kwargs, cache, self.state, self.labels)
        return (), kwargs

    def post(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Behind the decoder."""
        cache = output.past_key_values
        if self.run is not None and cache is not None and caches.state_of(cache) is None:
            caches.bind(cache, State(self, None))
        self.records = self.hook.end(self.run, cache)


def tokens_of(ids: Tensor, valid: Tensor | None) -> Tokens | None:
    """What a model's input hook would find."""
    unit = torch.full(ids.shape, -1, dtype=torch.int32)
    frame = unit.clone()
    units = []
    for b, row in enumerate(ids.tolist()):
        visual = False
        for i, token in enumerate(row):
            now = FROM <= token < TO
            if now and not visual:
                units.append([b, 0])
            if now:
                unit[b, i], frame[b, i] = len(units) - 1, units[-1][1] // 4
                units[-1][1] += 1
            visual = now
    if not units:
        return None
    return Tokens(unit, frame, [Unit("video", b, (1, 1, n)) for b, n in units], valid)


def reference(model: Any, prompt: list[int], more: list[int], drop: Any, position: str = "keep") -> Tensor:
    """Logits of one row without padding and cache, from the last prompt token on; that token asks."""
    ids = torch.tensor([prompt + more])
    with Plain(model, drop, position) as plain, torch.no_grad():
        plain.labels = torch.tensor([[-100] * len(prompt) + more])
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[-len(more) - 1 :]


def forced(model: Any, drop: Any, given: list[list[int]], steps: int = 3, side: str = "left", **options: Any) -> Any:
    """Prefill, then ``steps`` given tokens with the cache; logits ``[B, steps + 1, V]``, the tokens and the cache."""
    g = torch.Generator().manual_seed(99)
    more = torch.randint(5, 200, (len(given), steps), generator=g)
    position = options.pop("position", "keep")
    with Plain(model, drop, position) as plain, torch.no_grad():
        inputs = batch(given, side)
        mask = inputs["attention_mask"]
        number = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=number, use_cache=True, **options)
        logits = [out.logits[:, -1]]
        for i in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            number = mask.sum(1, keepdim=True) - 1
            out = model(
                input_ids=more[:, i : i + 1],
                attention_mask=mask,
                position_ids=number,
                past_key_values=out.past_key_values,
            )
            logits.append(out.logits[:, -1])
        plain.cache = out.past_key_values
    return torch.stack(logits, 1), more, plain


__all__ = ["Plain", "batch", "forced", "make", "reference", "rows", "tiny", "tokens_of"]
