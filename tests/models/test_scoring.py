"""Scores of the decoder's visual tokens: queries and keys as layers make them, presets as references score."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny, zoo
from tests.models.zoo import _common
from vidtok.models import attach, families, scoring
from vidtok.models.attentions import find_attention
from vidtok.models.budgets import groups, keys, originals
from vidtok.models.drop import Drop
from vidtok.models.layers import Layers
from vidtok.models.report import Unit
from vidtok.models.tokens import Tokens

# ---------------------------------------------------------------------- queries and keys of every family
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


# ---------------------------------------------------------------------- presets against dense formulas
N, VISUAL = 3, (6, 46)


class Dense:
    """The whole L×L attention of a Llama-like layer in fp64, written from its formula."""

    def __init__(self, model: Any, layer: int, ids: Tensor, norm: bool, rope: bool) -> None:
        config = model.config
        self.block = model.model.layers[layer]
        caught: list[Tensor] = []
        hook = self.block.register_forward_pre_hook(
            lambda m, a, k: caught.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        hook.remove()
        self.hidden = caught[0]
        x = self.hidden[0].double()
        if norm:
            weight = self.block.input_layernorm.weight.double()
            x = x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight
        length, heads, kv, dim = x.shape[0], config.num_attention_heads, config.num_key_value_heads, config.head_dim
        attention = self.block.self_attn
        q, k = (x @ p.weight.double().T for p in (attention.q_proj, attention.k_proj))
        if attention.q_proj.bias is not None:
            q, k = q + attention.q_proj.bias.double(), k + attention.k_proj.bias.double()
        q, k = q.view(length, heads, dim).transpose(0, 1), k.view(length, kv, dim).transpose(0, 1)
        angle = torch.arange(length).double()[:, None] / 1e4 ** (torch.arange(0, dim, 2).double() / dim)
        if rope:
            q, k = self.turn(q, angle), self.turn(k, angle)
        k = torch.stack([k[h * kv // heads] for h in range(heads)])
        logits = q @ k.transpose(1, 2) / math.sqrt(dim)
        hidden_from = torch.ones(length, length, dtype=torch.bool).triu(1)
        #: ``[H, L, L]``
        self.share = logits.masked_fill(hidden_from, -torch.inf).softmax(-1)

    @staticmethod
    def turn(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def one_video(length: int = 56) -> Tokens:
    """One row, one video of 4 frames of 10 tokens, text around it."""
    unit = torch.full((1, length), -1, dtype=torch.int32)
    unit[0, slice(*VISUAL)] = 0
    frame = torch.full((1, length), -1, dtype=torch.int32)
    frame[0, slice(*VISUAL)] = torch.arange(40, dtype=torch.int32) // 10
    return Tokens(unit, frame, [Unit("video", 0, (4, 2, 5))])


def scored(model: Any, drop: Drop, tokens: Tokens, dense: Dense, labels: Tensor | None = None) -> tuple[Any, Tensor]:
    """Columns that the stage keeps, and its scores."""
    key = keys(drop, tokens)
    chosen = groups(drop, 0, key, originals(key))
    length = tokens.unit.shape[1]
    position = model.model.rotary_emb(dense.hidden, torch.arange(length)[None])
    asking = scoring.queries(drop, tokens, labels)
    columns, score = scoring.importance(drop, dense.block, dense.hidden, position, chosen, None, asking)
    picked = scoring.select(
        drop,
        0,
        key,
        originals(key),
        layer=dense.block,
        hidden=dense.hidden,
        position_embeddings=position,
        asking=asking,
    )
    visual = tokens.unit[0] >= 0
    assert picked.mask[0][~visual].all()
    assert picked.dropped == [int((~picked.mask).sum())]
    kept = (picked.mask[0] & visual).nonzero().squeeze(1)
    assert kept.tolist() == sorted(columns.tolist())
    return kept.tolist(), score


@pytest.fixture(scope="module")
def llama():
    return plain("Llama", layers=5, attention="eager")


@pytest.fixture(scope="module")
def qwen2():
    return plain("Qwen2", layers=5, attention="eager", rms_norm_eps=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("preset", "layer", "norm", "rope", "count"),
    [
        # layer whose q and k the reference takes for boundary N; how many of 40 it keeps at ratio 0.29
        ("timeviper", N, False, False, int(40 * 0.29)),
        ("pyramiddrop", N, True, True, int(40 * 0.29)),
        ("fastv", N - 1, True, True, round(40 * 0.29)),
        ("vscan", N, True, False, int(0.29 * 40)),
    ],
)
def test_a_preset_scores_as_its_reference(name, preset, layer, norm, rope, count, request):
    model = request.getfixturevalue(name)
    ids = torch.randint(5, 240, (1, 56), generator=torch.Generator().manual_seed(3))
    dense = Dense(model, layer, ids, norm, rope)
    want = dense.share[:, -1, slice(*VISUAL)].mean(0)
    drop = Drop(f"attn_{N}_0.29", preset=preset)
    assert drop.scorers == (layer,) and drop.entries == (N,)
    kept, score = scored(model, drop, one_video(), dense)
    torch.testing.assert_close(score.double(), want, rtol=2e-4, atol=1e-7)
    order = want.argsort(descending=True, stable=True)
    assert want[order[count - 1]] - want[order[count]] > 1e-4 * want[order[count]], "no clear decision in this case"
    assert kept == sorted((VISUAL[0] + order[:count]).tolist())
    if preset == "fastv":
        with torch.no_grad():
            real = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[layer]
        torch.testing.assert_close(score, real[0, :, -1, slice(*VISUAL)].mean(0), rtol=1e-3, atol=1e-6)
    others = {
        other: scored(model, Drop(f"attn_{N}_0.29", preset=other), one_video(), dense)[1]
        for other in ("timeviper", "pyramiddrop", "vscan")
        if (Drop(f"attn_{N}_0.29", preset=other).norm, Drop(f"attn_{N}_0.29", preset=other).rope) != (norm, rope)
    }
    assert others
    for other in others.values():
        assert (other - score).abs().max() > 1e-3, "options that change nothing"


def test_pyramiddrop_averages_the_turns_in_training(llama):
    ids = torch.randint(5, 240, (1, 64), generator=torch.Generator().manual_seed(4))
    labels = torch.full((1, 64), -100)
    labels[0, 50:54] = ids[0, 50:54]
    labels[0, 60:63] = ids[0, 60:63]
    tokens = one_video(64)
    dense = Dense(llama, N, ids, True, True)
    want = dense.share[:, [49, 59], slice(*VISUAL)].mean((0, 1))
    _, score = scored(llama, Drop(f"attn_{N}_0.5", preset="pyramiddrop"), tokens, dense, labels)
    torch.testing.assert_close(score.double(), want, rtol=2e-4, atol=1e-7)
    want = dense.share[:, 59, slice(*VISUAL)].mean(0)
    _, score = scored(llama, Drop(f"attn_{N}_0.5", preset="pyramiddrop", query="last"), tokens, dense, labels)
    torch.testing.assert_close(score.double(), want, rtol=2e-4, atol=1e-7)


def test_prunevid_takes_the_largest_over_heads_and_question_rows(qwen2):
    ids = torch.randint(5, 240, (1, 56), generator=torch.Generator().manual_seed(5))
    dense = Dense(qwen2, N, ids, True, True)
    want = dense.share[:, VISUAL[1] :, slice(*VISUAL)].amax((0, 1))
    drop = Drop(f"attn_{N}_0.4", preset="prunevid")
    assert (drop.scorers, drop.entries) == ((N,), (N + 1,))
    kept, score = scored(qwen2, drop, one_video(), dense)
    torch.testing.assert_close(score.double(), want, rtol=2e-4, atol=1e-7)
    expected = []
    for frame in range(4):  # no stage 1: every frame is a group of its own
        part = want[10 * frame : 10 * frame + 10]
        expected += sorted((VISUAL[0] + 10 * frame + part.topk(int(10 * 0.4)).indices).tolist())
    assert kept == expected
    with torch.no_grad():
        real = qwen2(input_ids=ids, output_attentions=True, use_cache=False).attentions[N]
    torch.testing.assert_close(score, real[0, :, VISUAL[1] :, slice(*VISUAL)].amax((0, 1)), rtol=1e-3, atol=1e-6)


def test_equal_tokens_are_kept_in_order_of_place(llama):
    ids = torch.randint(5, 240, (1, 56), generator=torch.Generator().manual_seed(6))
    ids[0, slice(*VISUAL)] = 77
    dense = Dense(llama, 0, ids, False, False)
    kept, score = scored(llama, Drop("attn_0_0.3"), one_video(), dense)
    assert score.unique().numel() == 1
    assert kept == list(range(VISUAL[0], VISUAL[0] + 12))


# ---------------------------------------------------------------------- presets inside attached models
@pytest.fixture(scope="module")
def vlms():
    made: dict[str, Any] = {}
    return lambda kind: made.setdefault(kind, tiny.make(kind, "eager", layers=4))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("preset", "layer"), [("fastv", 1), ("pyramiddrop", 2)])
def test_attached_presets_keep_what_the_models_attention_weights_say(kind, preset, layer, vlms):
    """With norm and rotation, scores are the attention weights of the layer that a preset asks."""
    model, inputs = vlms(kind), tiny.batch(kind, tiny.MIXED)
    drop = Drop("attn_2_0.4", preset=preset)
    with attach(model, decoder=drop) as handle, torch.no_grad():
        model(**inputs, use_cache=False)
        samples = handle.report().samples
    assert len(samples) == sum(map(len, tiny.MIXED))
    for i in range(len(tiny.MIXED)):
        row = tiny.row(inputs, tiny.MIXED, i)
        with torch.no_grad():
            weights = model(**row, use_cache=False, output_attentions=True).attentions[layer]
        score = weights[0, :, -1].mean(0)
        ids = row["input_ids"][0]
        for word, name in ((tiny.VIDEO, "video"), (tiny.IMAGE, "image")):
            columns = (ids == word).nonzero().squeeze(1)
            for sample in [s for s in samples if s.row == i and s.kind == name]:
                own, columns = columns[: sample.tokens_in], columns[sample.tokens_in :]
                keep = drop.keep(0, len(own), len(own))
                best = score[own].argsort(descending=True, stable=True)
                assert sorted(best[:keep].tolist()) == sample.at(2).anchor.tolist()
                assert sample.at(1).num_out == sample.tokens_in


def test_a_second_stage_scores_what_the_first_left(vlms):
    model, inputs = vlms("qwen2_5_vl"), tiny.batch("qwen2_5_vl", [tiny.ROWS[0]])
    caught: list[Tensor] = []
    first = model.model.language_model.layers[2]
    with attach(model, decoder="uni_1_0.5") as handle, torch.no_grad():
        watch = first.register_forward_pre_hook(
            lambda m, a, k: caught.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        model(**inputs, use_cache=False)
        watch.remove()
        (sample,) = handle.report().samples
    left = sample.at(2).anchor
    hidden, attention = caught[0][0], first.self_attn
    start = int((inputs["input_ids"][0] == tiny.VIDEO).nonzero()[0, 0])
    q = attention.q_proj(hidden[-1:]).view(1, 4, 16).transpose(0, 1)
    k = attention.k_proj(hidden).view(-1, 2, 16).transpose(0, 1).repeat_interleave(2, 0)
    share = (q @ k.transpose(1, 2) / 4).softmax(-1).mean((0, 1))[start : start + len(left)]
    best = share.argsort(descending=True, stable=True)[: int(0.25 * sample.tokens_in)]
    with attach(model, decoder="uni_1_0.5-attn_2_0.25") as handle, torch.no_grad():
        model(**inputs, use_cache=False)
        (sample,) = handle.report().samples
    assert sample.at(2).anchor.tolist() == left[best.sort().values].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny.make("qwen2_5_vl", layers=3).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.batch("qwen2_5_vl", tiny.ROWS).items()}
    for preset in ("timeviper", "pyramiddrop", "prunevid"):
        with attach(model, decoder=Drop("attn_1_0.4", preset=preset)) as handle:
            logits = tiny.generate(model, inputs, 3)[0]
            assert logits.isfinite().all() and all(s.at(2).num_out < s.tokens_in for s in handle.report().samples)


def test_a_reference_that_leaves_no_token_still_decodes(vlms):
    model, inputs = vlms("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    for kind in ("uni", "attn"):
        drop = Drop(f"{kind}_1_0.001", preset="timeviper")
        with attach(model, decoder=drop) as handle:
            got = tiny.generate(model, inputs, 3)[0]
            assert [s.at(1).num_out for s in handle.report().samples] == [0] * 4
        alone = tiny.row(inputs, tiny.ROWS, 1)
        with attach(model, decoder=drop):
            torch.testing.assert_close(tiny.generate(model, alone, 3)[0], got[1:2], rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------- rows of a batch
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


def columns_of(drop: Drop, tokens: Tokens, labels: Tensor | None = None) -> list[list[int]]:
    return scoring.query_columns(scoring.queries(drop, tokens, labels)).tolist()


def test_which_rows_ask():
    _, tokens, labels = ragged()
    last, turns, question = (Drop("attn_1_0.5", query=q) for q in ("last", "turns", "question"))
    assert columns_of(last, tokens) == columns_of(turns, tokens) == [[39]] * 3
    assert columns_of(last, tokens, labels) == columns_of(turns, tokens, labels) == [[34]] * 3
    labels[1, 30:32] = 1
    assert columns_of(last, tokens, labels) == [[34]] * 3, "the last turn"
    assert columns_of(turns, tokens, labels) == [[34, -1], [29, 34], [34, -1]]
    assert columns_of(question, tokens)[0] == [*range(30, 40), *[-1] * 10]
    assert columns_of(question, tokens, labels)[0][:6] == [30, 31, 32, 33, 34, -1]
    assert columns_of(question, tokens, labels)[1][:8] == [26, 27, 28, 29, 32, 33, 34, -1], "no answer asks"
    labels[:] = -100
    assert columns_of(turns, tokens, labels) == [[39]] * 3, "no answer: as at inference"
    flipped = Tokens(tokens.unit.flip(1), tokens.frame.flip(1), tokens.units, tokens.valid.flip(1))
    assert columns_of(last, flipped) == [[31], [39], [19]], "right padding"


def test_a_row_of_a_batch_is_scored_as_if_alone():
    model = plain("Llama")
    layer = model.model.layers[1]
    ids, tokens, _ = ragged()
    hidden = model.get_input_embeddings()(ids).detach()
    position = model.model.rotary_emb(hidden, torch.arange(40)[None])
    for preset in ("timeviper", "pyramiddrop", "prunevid"):
        drop = Drop("attn_1_0.4", preset=preset)
        key = keys(drop, tokens)
        kept = scoring.select(
            drop, 0, key, originals(key), layer=layer, hidden=hidden, position_embeddings=position,
            valid=tokens.valid, asking=scoring.queries(drop, tokens),
        )  # fmt: skip
        assert 0 < sum(kept.dropped) < 32 and kept.dropped[2] == 0
        for i in range(3):
            real = tokens.valid[i]
            alone = Tokens(tokens.unit[i : i + 1, real], tokens.frame[i : i + 1, real], tokens.units)
            single = keys(drop, alone)
            part = scoring.select(
                drop, 0, single, originals(single), layer=layer, hidden=hidden[i : i + 1, real],
                position_embeddings=tuple(x[:, real] for x in position), asking=scoring.queries(drop, alone),
            )  # fmt: skip
            assert part.mask[0].tolist() == kept.mask[i, real].tolist(), (preset, i)


def test_training_decides_as_inference_does():
    model = plain("Llama")
    ids, tokens, labels = ragged()
    hidden = model.get_input_embeddings()(ids).detach()
    position = model.model.rotary_emb(hidden, torch.arange(40)[None])
    drop = Drop("attn_1_0.3", norm=True, rope=True)
    key = keys(drop, tokens)

    def choose(stop: int, labels: Tensor | None) -> Tensor:
        part = Tokens(tokens.unit[:, :stop], tokens.frame[:, :stop], tokens.units, tokens.valid[:, :stop])
        return scoring.select(
            drop, 0, key[:, :stop], originals(key), layer=model.model.layers[1], hidden=hidden[:, :stop],
            position_embeddings=tuple(x[:, :stop] for x in position), valid=part.valid,
            asking=scoring.queries(drop, part, labels),
        ).mask  # fmt: skip

    trained, inferred = choose(40, labels), choose(35, None)
    assert torch.equal(trained[:, :35], inferred)
    assert not torch.equal(choose(40, None)[:, :35], inferred), "asking with the answer's last token decides otherwise"


# ---------------------------------------------------------------------- side effects
def test_weights_that_accelerate_keeps_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    want = None
    for offload in (False, True):
        model = tiny.make("qwen2_5_vl", layers=3)
        if offload:
            accelerate.cpu_offload(model, torch.device("cpu"))
            assert model.model.language_model.layers[1].self_attn.k_proj.weight.is_meta
        with attach(model, decoder=Drop("attn_1_0.4", norm=True, rope=True)):
            got = tiny.generate(model, inputs, 3)[0]
        want = got if want is None else want
    assert torch.equal(got, want)


class Noisy(nn.Linear):
    """A projection with an adapter's dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_scoring_draws_nothing_and_leaves_modes_alone():
    model = plain("Llama").train()
    layer = model.model.layers[1]
    layer.self_attn.k_proj.__class__ = Noisy
    ids, tokens, _ = ragged()
    hidden = model.get_input_embeddings()(ids)
    drop = Drop("attn_1_0.4")
    key = keys(drop, tokens)

    def choose() -> Any:
        chosen = groups(drop, 0, key, originals(key))
        return scoring.importance(drop, layer, hidden, None, chosen, tokens.valid, scoring.queries(drop, tokens))

    state = torch.get_rng_state()
    first, second = choose(), choose()
    assert torch.equal(first[1], second[1]) and not first[1].requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training and layer.self_attn.k_proj.training


def test_autocast_keeps_gradients_of_the_projections():
    model = plain("Llama")
    layer = model.model.layers[1]
    ids, tokens, _ = ragged()
    drop = Drop("attn_1_0.4", norm=True)
    key = keys(drop, tokens)

    def gradient() -> Tensor | None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.get_input_embeddings()(ids)
            scoring.select(
                drop, 0, key, originals(key), layer=layer, hidden=hidden, valid=tokens.valid,
                asking=scoring.queries(drop, tokens),
            )  # fmt: skip
            layer.self_attn.k_proj(hidden).sum().backward()
        return layer.self_attn.k_proj.weight.grad

    assert gradient() is not None


MEMORY = """
    import resource, sys, torch
    torch.set_num_threads(1)
    from transformers import {name}Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
    from vidtok.models import scoring
    from vidtok.models.budgets import keys, originals
    from vidtok.models.drop import Drop
    from vidtok.models.report import Unit
    from vidtok.models.tokens import Tokens

    config = {name}Config(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=64)
    config._attn_implementation = "sdpa"
    length, dtype = 23_000, torch.{dtype}
    layer = Qwen2DecoderLayer(config, 0).to(dtype)
    unit = torch.full((1, length), -1, dtype=torch.int32)
    unit[0, 100:22_900] = 0
    tokens = Tokens(unit, unit.clone(), [Unit("video", 0, (1, 120, 190))])
    position = Qwen2RotaryEmbedding(config)(torch.zeros(1, dtype=dtype), torch.arange(length)[None])
    drop = Drop("attn_1_0.3", norm=True, rope=True)
    key = keys(drop, tokens)
    original, asking = originals(key), scoring.queries(drop, tokens)
    def choose(n):
        return scoring.select(
            drop, 0, key[:, :n], original, layer=layer, hidden=hidden[:, :n],
            position_embeddings=tuple(x[:, :n] for x in position), asking=asking[:, -n:],
        )
    hidden = torch.empty(1, length, 3584, dtype=dtype).uniform_(-1, 1)
    choose(600)  # libraries set themselves up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = choose(length)
    assert kept.dropped == [22_800 - int(22_800 * 0.3)], kept.dropped
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_scoring_23_000_tokens_takes_less_than_100_mb():
    script = textwrap.dedent(MEMORY).format(name="Qwen2", dtype="float32")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    megabytes = float(run.stdout.split()[-1])
    assert 1 < megabytes < 100
