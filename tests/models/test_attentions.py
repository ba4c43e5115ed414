"""Queries and keys: those of the layers' own forward, for every family."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, zoo
from tests.models.texts import plain
from vidtok.models import attach, families, scoring
from vidtok.models.attentions import find_attention
from vidtok.models.drop import Drop
from vidtok.models.layers import Layers

MIXED = "expected a layer of one residual stream for attn, got "
LATENT = "expected attention with q_proj and k_proj, or qkv_proj, for attn, got "
REFUSED = {
    "dots3_note": LATENT + "Dots3NoteTextDecoderLayer",
    "gemma3n": MIXED + "Gemma3nTextDecoderLayer with altup",
    "glm5_next": LATENT + "Glm5NextTextDecoderLayer",
    "qwen4_exp": MIXED + "Qwen4ExpTextDecoderLayer with",
}


FAMILIES = sorted(m.name for m in pkgutil.iter_modules(zoo.__path__) if not m.name.startswith("_"))


def captured(model: Any, language_model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """(layer, its input, its position embeddings, query, key, scale) of each attention layer, from one forward pass."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    made: dict[int, tuple[Any, ...]] = {}

    def watch(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        made[id(module)] = (q.detach().clone(), k.detach().clone(), kwargs.get("scaling"))
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)

    AttentionInterface.register("vidtok_watch", watch)
    AttentionMaskInterface.register("vidtok_watch", sdpa_mask)
    layers = Layers(language_model)
    calls: dict[int, tuple[Any, ...]] = {}

    def record(layer: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        calls[id(layer)] = (hidden.detach(), scoring.positions_of(layer, kwargs))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers.modules]
    before = {}
    for m in model.modules():
        config = getattr(m, "config", None)
        if config is not None and id(config) not in before:
            before[id(config)] = (config, config._attn_implementation)
            config._attn_implementation = "vidtok_watch"
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for h in handles:
            h.remove()
        for config, implementation in before.values():
            config._attn_implementation = implementation
    out = []
    for layer, kind in zip(layers.modules, layers.kinds):
        if kind not in ("linear_attention", "none"):
            attention = find_attention(layer)
            out.append((layer, *calls[id(layer)], *made[id(attention.module)]))
    return out


def agree(call: tuple[Any, ...]) -> None:
    layer, hidden, position, q, k, scale = call
    length = hidden.shape[1]
    columns = torch.tensor([[length - 1, length // 2]]).expand(hidden.shape[0], 2)
    query, key, factor = scoring.query_and_key(
        Drop("attn_1_0.5", norm=True, rope=True), layer, hidden, position, columns
    )
    at = columns[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    torch.testing.assert_close(key, k, rtol=1e-5, atol=1e-5 * float(k.abs().max()))
    torch.testing.assert_close(query, q.gather(2, at), rtol=1e-5, atol=1e-5 * float(q.abs().max()))
    assert scale is None or abs(factor - scale) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_are_those_of_the_layers_own_forward(family, monkeypatch):
    module = importlib.import_module(f"tests.models.zoo.{family}")
    if tiny.VERSION < module.MIN_VERSION:
        return
    monkeypatch.setattr(scoring, "CHUNK", 64 * 64 * 3)  # several pieces of keys
    model = module.make(layers=3)
    base = getattr(model, "model", model)
    try:
        language_model = families.locate(model).language_model
    except ValueError:
        language_model = getattr(base, "language_model", model)
    if family in REFUSED:
        layers = Layers(language_model)
        found = [x for x, kind in zip(layers.modules, layers.kinds) if "linear" not in kind and kind != "none"]
        with pytest.raises(ValueError, match=REFUSED[family]):
            find_attention(found[0])
        return
    calls = captured(model, language_model, module.batch(module.ROWS))
    assert calls
    for call in calls:
        agree(call)


PLAIN = ("Llama", "Qwen3", "Phi3", "Glm4", "Olmo2", "Gemma", "SmolLM3", "Exaone4", "Cohere2", "Starcoder2", "NemotronH")


@pytest.mark.parametrize("name", PLAIN)
def test_queries_and_keys_of_plain_language_models(name):
    if name == "NemotronH" and tiny.VERSION < (5, 17):
        return
    model = plain(name)
    ids = torch.randint(5, 240, (2, 40), generator=torch.Generator().manual_seed(0))
    calls = captured(model, model, {"input_ids": ids})
    assert len(calls) == (1 if name == "NemotronH" else 3)
    for call in calls:
        agree(call)


def test_attention_that_scores_cannot_reproduce_is_refused():
    capped = plain("Gemma2", attention="eager").model.layers[0]
    with pytest.raises(ValueError, match="expected attention without soft-capped logits for attn, got Gemma2Attention"):
        find_attention(capped)
    model = plain("Llama")
    layer = model.model.layers[0]
    layer.self_attn.twist = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="expected attention of known parts for attn, got LlamaAttention with twist"):
        find_attention(layer)
    with pytest.raises(ValueError, match="expected attention of known parts for attn, got LlamaAttention with twist"):
        attach(model, decoder="attn_0_0.5")
    attach(model, decoder="uni_0_0.5").restore()
    del layer.self_attn.twist
    del layer.input_layernorm
    with pytest.raises(ValueError, match="expected LlamaDecoderLayer to have an input norm"):
        find_attention(layer)
