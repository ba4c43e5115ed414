"""Drops inside the decoder: every layer sees its own tokens, with and without cache, alone and in a batch."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.models import plain, tiny
from vidtok.models import following, layers
from vidtok.models.run import Step

CLOSE = {"rtol": 0, "atol": 2e-5}
GIVEN = plain.GIVEN
KINDS = [kind for kind in plain.OPTIONS if kind != "nemotron_h" or tiny.VERSION >= (5, 17)]
SPECS = {"nemotron_h": ["uni_1_0.5-uni_3_0.25", "uni_3_0.5-attn_4_0.3"]}


@pytest.fixture
def language():
    """Plain models by kind and attention."""
    return plain.get


@pytest.fixture(autouse=True)
def no_grad():
    """Nothing here trains."""
    with torch.no_grad():
        yield


def cases():
    """Kinds with specs that fit them."""
    for kind in KINDS:
        for spec in SPECS.get(kind, ["uni_1_0.5-attn_3_0.25", "attn_0_0.6-uni_2_0.3"]):
            yield kind, spec


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "spec"), list(cases()))
def test_cached_batch_equals_each_row_alone_uncached(language, kind, spec, attention, position):
    model = language(kind, attention)
    with vidtok.attach(model, decoder=spec, position=position) as handle:
        logits, more, cache = plain.answer(model, handle, GIVEN)
        for i, row in enumerate(GIVEN):
            alone = plain.reference(model, handle, row, more[i].tolist())
            torch.testing.assert_close(logits[i], alone, **CLOSE)
    untouched = model(input_ids=torch.tensor([GIVEN[0] + more[0].tolist()])).logits[0, -4:]
    assert float((untouched - logits[0]).abs().max()) > 1e-2
    held = [n for n in plain.lengths(cache) if n is not None]
    if kind not in ("mistral", "mixed"):
        assert held == sorted(held, reverse=True) and held[-1] < len(GIVEN[0]) + 3
    assert int(cache.get_seq_length()) == max(map(len, GIVEN)) + 3


@pytest.mark.parametrize("kind", KINDS)
def test_right_padding_without_cache(language, kind):
    model = language(kind)
    spec = SPECS.get(kind, ["uni_1_0.5-attn_3_0.25"])[-1]
    inputs = plain.batch(GIVEN, "right")
    with vidtok.attach(model, decoder=spec) as handle:
        with handle.tokens(plain.visual(inputs["input_ids"])):
            logits = model(**inputs, **plain.positions(model, inputs["attention_mask"]), use_cache=False).logits
        for i, row in enumerate(GIVEN):
            ids = torch.tensor([row])
            with handle.tokens(plain.visual(ids)):
                alone = model(input_ids=ids, use_cache=False).logits[0, -3:]
            torch.testing.assert_close(logits[i, -3:], alone, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_one_is_bit_equal(language, kind, attention):
    model = language(kind, attention)
    inputs = plain.batch(GIVEN)
    number = plain.positions(model, inputs["attention_mask"])
    before = model(**inputs, **number).logits
    with vidtok.attach(model, decoder="uni_1_1-uni_3_1") as handle, handle.tokens(plain.visual(inputs["input_ids"])):
        assert torch.equal(model(**inputs, **number).logits, before)
    assert torch.equal(model(**inputs, **number).logits, before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_arguments_are_those_of_the_model(language, kind, attention, monkeypatch):
    """Each layer's mask and positions, made anew for rows that lost nothing, leave the logits as they are."""
    model = language(kind, attention)
    inputs = plain.batch(GIVEN)
    number = plain.positions(model, inputs["attention_mask"])
    before = model(**inputs, **number).logits
    built = []
    mask = following.Following._mask
    monkeypatch.setattr(following.Following, "_mask", lambda self, *a: built.append(mask(self, *a)) or built[-1])
    with vidtok.attach(model, decoder="uni_0_1") as handle, handle.tokens(plain.visual(inputs["input_ids"])):
        after = model(**inputs, **number).logits
    assert built
    real = inputs["attention_mask"].bool()
    assert torch.equal(after[real], before[real])


def test_control_stale_decode_mask(language, monkeypatch):
    model = language("qwen2")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        good, *_ = plain.answer(model, handle, GIVEN)
        made = following.Following._mask

        def stale(self, run, step, *rest):
            if run.tokens is None:
                step.mask = None
            return made(self, run, step, *rest)

        monkeypatch.setattr(following.Following, "_mask", stale)
        bad, *_ = plain.answer(model, handle, GIVEN)
    torch.testing.assert_close(bad[:, 0], good[:, 0], **CLOSE)
    assert float((bad[:, 1:] - good[:, 1:]).abs().max()) > 1e-3


def test_control_stale_rotation(language, monkeypatch):
    model = language("qwen2")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        good, *_ = plain.answer(model, handle, GIVEN)
        follow = layers.follow

        def first(name, value, rows, length):
            right = follow(name, value, rows, length)
            if not name.startswith("position_embeddings"):
                return right
            return tuple(x[:, -y.shape[1] :].expand_as(y) for x, y in zip(value, right))

        monkeypatch.setattr(layers, "follow", first)
        bad, *_ = plain.answer(model, handle, GIVEN)
    assert float((bad - good).abs().max()) > 1e-3


def test_control_window_of_the_whole_rows(language, monkeypatch):
    model = language("mistral")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        good, more, _ = plain.answer(model, handle, GIVEN)
        handle._hook.decoder.layers.kinds[:] = ["full_attention"] * 4
        bad = plain.reference(model, handle, GIVEN[0], more[0].tolist())
    assert float((bad - good[0]).abs().max()) > 1e-3


def test_text_is_untouched_and_nothing_stays_on_the_model(language):
    model = language("qwen2")
    text = torch.tensor([[5, 9, 33, 7, 80]])
    before = model(input_ids=text).logits
    keys = set(model.state_dict())
    with vidtok.attach(model, decoder="uni_1_0.5-attn_2_0.25") as handle:
        assert torch.equal(model(input_ids=text).logits, before)
        plain.answer(model, handle, GIVEN)
        out = model(input_ids=text, use_cache=True)
        assert torch.equal(out.logits, before)
        assert "_vidtok" not in out.past_key_values.__dict__
        assert set(model.state_dict()) == keys
        assert getattr(handle._hook.decoder._local, "run", None) is None
    assert torch.equal(model(input_ids=text).logits, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_of_a_text_call_get_no_run(language, monkeypatch):
    """Hooks return at once: no names, no masks."""
    model = language("qwen2")
    monkeypatch.setattr(layers, "named", None)
    with vidtok.attach(model, decoder="uni_1_0.5"):
        model(input_ids=torch.tensor([[5, 9, 33]]))


def test_hidden_states_of_unequal_length(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25") as handle, handle.tokens(plain.visual(ids)):
        out = model(input_ids=ids, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [32, 32, 20, 20, 14]


def test_budgets_and_frames(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[1]])
    for budget, left in (("item", 6 + 4), ("sample", 10), ("frame", 9)):
        drop = vidtok.Drop("uni_1_0.5", budget=budget)
        with vidtok.attach(model, decoder=drop) as handle, handle.tokens(plain.visual(ids), frames=3):
            out = model(input_ids=ids, use_cache=True)
        assert plain.lengths(out.past_key_values)[1:] == [len(GIVEN[1]) - 21 + left] * 3


def test_specs_that_do_not_fit_the_model(language):
    model = language("qwen2")
    for spec, words in (("uni_4_0.5", "a layer from 0 to 3"), ("uni_1_0.5-attn_1_0.2", "layers that ascend")):
        with pytest.raises(ValueError, match=words):
            vidtok.attach(model, decoder=spec)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.skipif(tiny.VERSION < (5, 17), reason="no such model there")
def test_attn_needs_attention(language):
    with pytest.raises(ValueError, match="attn at an attention layer"):
        vidtok.attach(language("nemotron_h"), decoder="attn_3_0.5")


def test_unknown_arguments_per_token_are_refused(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="uni_1_0.5") as handle, handle.tokens(plain.visual(ids)):
        with pytest.raises(ValueError, match="expected known arguments of a decoder layer for the 32 tokens"):
            model(input_ids=ids, my_weights=torch.ones(1, 32))
        model(input_ids=ids, my_weights=torch.ones(1, 3))


def test_step_numbers_count_real_tokens():
    class Pass:
        batch, device = 2, torch.device("cpu")

    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    assert Step(0, 2, None, 2, mask).number(Pass()).tolist() == [[1, 2], [1, 2]]


def test_layers_that_get_no_arguments_still_drop(language, monkeypatch):
    """A decoder that keeps what it does not know to itself: the thread finds the pass, but not in a checkpoint."""
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="uni_1_0.5") as handle, handle.tokens(plain.visual(ids)):
        want = model(input_ids=ids).logits
        monkeypatch.setattr(handle._hook.decoder, "travels", False)
        assert torch.equal(model(input_ids=ids).logits, want)
        model.train()
        model.gradient_checkpointing_enable()
        try:
            with pytest.raises(ValueError, match="passes its arguments on to checkpointed layers"):
                model(input_ids=ids, use_cache=False)
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        assert handle._hook.decoder._local.run is None


def test_layers_that_do_not_run_are_noticed(language, monkeypatch):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    refused = pytest.raises(ValueError, match="expected 4 layers that run one after another")
    with vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.2") as handle, handle.tokens(plain.visual(ids)):
        monkeypatch.setattr(model.config, "num_hidden_layers", 2)
        with refused:
            model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("preset", ["timeviper", "pyramiddrop", "fastv", "vscan"])
def test_presets(language, preset, position):
    model = language("qwen3")
    drop = vidtok.Drop("uni_1_0.6-attn_2_0.5-attn_3_0.2", preset=preset)
    with vidtok.attach(model, decoder=drop, position=position) as handle:
        logits, more, _ = plain.answer(model, handle, GIVEN)
        for i, row in enumerate(GIVEN):
            alone = plain.reference(model, handle, row, more[i].tolist())
            torch.testing.assert_close(logits[i], alone, **CLOSE)


def test_compiled_models_drop_too(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="uni_1_0.5-attn_3_0.25") as handle, handle.tokens(plain.visual(ids)):
        want = model(input_ids=ids, use_cache=False).logits
        got = torch.compile(model, backend="eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, **CLOSE)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["attn_1_0.5-attn_2_0.2", "uni_1_0.08-attn_2_0.08"])
def test_a_prompt_that_ends_in_visual_tokens_keeps_its_last(spec):
    model = plain.make("qwen2", layers=3)
    ids = torch.cat([torch.tensor([[5, 6, 7]]), torch.randint(200, 232, (1, 24))], 1)
    shuffled = torch.cat([ids[:, :3], ids[:, 3:-1].flip(1), ids[:, -1:]], 1)
    seen = []
    with vidtok.attach(model, decoder=spec) as handle:
        for row in (ids, shuffled):
            with handle.tokens([(0, 3, 27)]):
                out = model(input_ids=row)
            (sample,) = handle.report().samples
            seen.append(sample.at(2).anchor.tolist())
            assert out.logits.shape[1] == 3 + len(seen[-1])
    # The last token stays although nothing else near it does, and the token that asks chooses by what it sees.
    assert all(anchors[-1] == 23 for anchors in seen)
    if spec.startswith("attn"):
        assert seen[0] != seen[1]
