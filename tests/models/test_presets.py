"""Presets: scores as their references score, on given weights and inside attached models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from tests.models.texts import plain
from vidtok.models import attach, scoring
from vidtok.models.budgets import groups, keys, originals
from vidtok.models.drop import Drop
from vidtok.models.report import Unit
from vidtok.models.tokens import Tokens

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
