"""Drops inside the decoder: every layer sees its own tokens, with and without cache, alone and in a batch."""

from __future__ import annotations

import copy

import pytest
import torch

import vidtok
from tests.models import flash, plain, tiny
from vidtok.models import following, layers
from vidtok.models.run import Step
from vidtok.models.unpacked import Unpacked

CLOSE = {"rtol": 0, "atol": 2e-5}
GIVEN = plain.rows([[24], [12, 9], [17]])
OPTIONS = {
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
KINDS = [kind for kind in OPTIONS if kind != "nemotron_h" or tiny.VERSION >= (5, 17)]
SPECS = {"nemotron_h": ["uni_1_0.5-uni_3_0.25", "uni_3_0.5-attn_4_0.3"]}


@pytest.fixture(scope="module")
def language():
    """Plain models by kind and attention."""
    made = {}

    def get(kind, attention="sdpa"):
        if (kind, attention) not in made:
            made[kind, attention] = plain.make("qwen2" if kind == "mixed" else kind, attention, **OPTIONS[kind])
        return made[kind, attention]

    return get


@pytest.fixture(autouse=True)
def no_grad(request):
    """Gradients only where a test asks for them."""
    with torch.set_grad_enabled("grad" in request.keywords):
        yield


def cases():
    """Kinds with specs that fit them."""
    for kind in KINDS:
        for spec in SPECS.get(kind, ["uni_1_0.5-attn_3_0.25", "attn_0_0.6-uni_2_0.3"]):
            yield kind, spec


# ---------------------------------------------------------------------- equality of logits
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


# ---------------------------------------------------------------------- what goes wrong without each part
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


# ---------------------------------------------------------------------- calls around
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


# ---------------------------------------------------------------------- caches
@pytest.mark.skipif(tiny.VERSION[0] < 5, reason="refused there")
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
@pytest.mark.parametrize("spec", ["uni_0_0.5", "uni_1_0.5-attn_3_0.25"])
def test_static_cache(language, kind, spec):
    from transformers import StaticCache

    model = language(kind)
    with vidtok.attach(model, decoder=spec) as handle:
        cache = StaticCache(config=model.config, max_cache_len=64)
        got, more, _ = plain.answer(model, handle, GIVEN, past_key_values=cache)
        for i, row in enumerate(GIVEN):
            torch.testing.assert_close(got[i], plain.reference(model, handle, row, more[i].tolist()), **CLOSE)


@pytest.mark.skipif(tiny.VERSION[0] > 4, reason="layers count for themselves there")
def test_static_cache_is_refused(language):
    from transformers import StaticCache

    model = language("qwen2")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="expected a cache that grows, got a static one"):
            plain.answer(model, handle, GIVEN, past_key_values=cache)


def continued(model, cache, ids, mask):
    """Logits of more tokens on a filled cache."""
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    number = {name: value[:, -ids.shape[1] :] for name, value in plain.positions(model, mask).items()}
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **number).logits


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_crop_reorder_repeat_and_copy(language, kind):
    model = language(kind)
    inputs = plain.batch(GIVEN)
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with vidtok.attach(model, decoder="uni_0_0.7-uni_2_0.25") as handle:
        _, _, cache = plain.answer(model, handle, GIVEN, 0)
        want = continued(model, copy.deepcopy(cache), more, inputs["attention_mask"])
        cropped = copy.deepcopy(cache)
        continued(model, cropped, torch.full((3, 4), 77), inputs["attention_mask"])
        cropped.crop(max(map(len, GIVEN)))
        torch.testing.assert_close(continued(model, cropped, more, inputs["attention_mask"]), want, **CLOSE)
        with pytest.raises(ValueError, match="expected to keep at least"):
            copy.deepcopy(cache).crop(10)
        order = torch.tensor([2, 0, 1])
        turned = copy.deepcopy(cache)
        turned.reorder_cache(order)
        got = continued(model, turned, more[order], inputs["attention_mask"][order])
        torch.testing.assert_close(got, want[order], **CLOSE)
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(2)
        mask = inputs["attention_mask"].repeat_interleave(2, 0)
        got = continued(model, wide, more.repeat_interleave(2, 0), mask)
        torch.testing.assert_close(got, want.repeat_interleave(2, 0), **CLOSE)
        narrow = copy.deepcopy(cache)
        narrow.batch_select_indices(order[:2])
        got = continued(model, narrow, more[order[:2]], inputs["attention_mask"][order[:2]])
        torch.testing.assert_close(got, want[order[:2]], **CLOSE)


def test_cache_of_other_drops_is_refused(language):
    model = language("qwen2")
    inputs = plain.batch(GIVEN)
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        _, _, cache = plain.answer(model, handle, GIVEN, 0)
    ids = torch.tensor([[7], [8], [9]])
    with pytest.raises(ValueError, match="whose attachment was removed"):
        continued(model, cache, ids, inputs["attention_mask"])
    with vidtok.attach(model, decoder="uni_2_0.5"), pytest.raises(ValueError, match="expected a cache"):
        continued(model, cache, ids, inputs["attention_mask"])


# ---------------------------------------------------------------------- several turns
@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
def test_second_turn_with_text_and_with_a_video(language, kind, position):
    """Both turns in one pass keep the same tokens: a video has a budget of its own."""
    model = language(kind)
    turns = [plain.rows([[16]], seed)[0] for seed in (3, 4)]
    text = [9, 60, 33]
    whole = torch.tensor([turns[0] + text + turns[1]])
    attached = vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25", position=position)
    with attached as handle, handle.tokens(plain.visual(whole)):
        want = model(input_ids=whole, use_cache=False).logits[0]
        cache = None
        for part in (turns[0], text, turns[1]):
            out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[0, -3:], want[-3:], **CLOSE)
    assert int(cache.get_seq_length()) == whole.shape[1]


def test_second_video_is_refused_for_attn(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="attn_1_0.5") as handle:
        with handle.tokens(plain.visual(ids)):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        start = len(GIVEN[0]) + 1
        refused = pytest.raises(ValueError, match="expected visual tokens in the first turn for attn")
        with handle.tokens([(0, start, start + 8)]), refused:
            model(input_ids=ids, past_key_values=cache)


# ---------------------------------------------------------------------- refusals
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


def packed(given):
    """One row of several, told apart by position ids that restart."""
    ids = torch.tensor([[token for row in given for token in row]])
    return ids, torch.cat([torch.arange(len(row)) for row in given])[None]


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
@pytest.mark.parametrize("spec", ["uni_1_0.5-uni_3_0.25", "attn_1_0.5-attn_3_0.25"])
def test_packed_rows_equal_each_sample_alone(language, kind, spec, attention, position):
    ids, restart = packed(GIVEN)
    with flash.installed():
        model = language(kind, attention)
        drop = vidtok.Drop(spec, budget="frame" if "uni" in spec else "sample", rope=True)
        with vidtok.attach(model, decoder=drop, position=position) as handle:
            with handle.tokens(plain.visual(ids)):
                got = model(input_ids=ids, position_ids=restart, use_cache=False).logits[0]
            alone = []
            for row in GIVEN:
                one = torch.tensor([row])
                with handle.tokens(plain.visual(one)):
                    alone.append(model(input_ids=one, use_cache=False).logits[0])
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)


def test_lengths_of_samples_follow(language):
    """flash attention reads them instead of the positions."""
    ids, restart = packed(GIVEN)
    borders = torch.tensor([0, *(len(row) for row in GIVEN)]).cumsum(0).int()
    longest = max(map(len, GIVEN))
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    labels = torch.where(plain.visual(ids), -100, ids)
    with flash.installed() as calls:
        model = language("qwen2", "flash_attention_2")
        with vidtok.attach(model, decoder="uni_1_0.5-attn_3_0.25") as handle, handle.tokens(plain.visual(ids)):
            want = model(input_ids=ids, position_ids=restart, labels=labels, use_cache=False)
            calls.clear()
            got = model(input_ids=ids, position_ids=restart, labels=labels, use_cache=False, **lengths)
            assert len(calls) == 4 and all(samples == 3 for _, samples, _ in calls)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


def test_packed_rows_with_a_cache_are_refused(language):
    """transformers does not part packed rows in a pass that fills a cache."""
    model = language("qwen2")
    ids, restart = packed(GIVEN)
    refused = pytest.raises(ValueError, match="expected use_cache=False with packed samples")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle, handle.tokens(plain.visual(ids)), refused:
        model(input_ids=ids, position_ids=restart, use_cache=True)


def test_packing_and_back():
    sample = torch.tensor([[-1, 0, 0, 1, 2, 2], [0, 0, 0, -1, 1, 1]])
    rows = Unpacked(sample)
    x = torch.arange(12).view(2, 6)
    want = [[-1, 1, 2], [-1, -1, 3], [-1, 4, 5], [6, 7, 8], [-1, 10, 11]]
    assert rows.unpack(x, -1).tolist() == want and rows.row.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(rows.pack(rows.unpack(x, 0), -1), x.masked_fill(sample < 0, -1))
    assert Unpacked(torch.zeros(2, 3).long()).valid is None


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


def test_right_padding_with_a_cache(language):
    """Layers before a drop keep the layout that they were given, those behind it are padded at the left."""
    model = language("qwen2")
    inputs = plain.batch(GIVEN, "right")
    mask = inputs["attention_mask"]
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25") as handle:
        with handle.tokens(plain.visual(inputs["input_ids"])):
            out = model(**inputs, **plain.positions(model, mask), use_cache=True)
        logits = [out.logits[:, -1]]
        for i in range(2):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            number = mask.sum(1, keepdim=True) - 1
            given = {"input_ids": more[:, i : i + 1], "attention_mask": mask, "position_ids": number}
            logits.append(model(**given, past_key_values=out.past_key_values).logits[:, -1])
        for i, row in enumerate(GIVEN):
            alone = plain.reference(model, handle, row, more[i].tolist())
            torch.testing.assert_close(torch.stack(logits, 1)[i], alone, **CLOSE)


@pytest.mark.skipif(tiny.VERSION < (5, 17), reason="no such model there")
def test_recurrent_layers_go_on_in_a_second_turn(language):
    model = language("nemotron_h")
    parts = [plain.rows([[16]], 3)[0], [9, 60, 33], plain.rows([[16]], 4)[0]]
    whole = torch.tensor([[token for part in parts for token in part]])
    attached = vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25")
    with attached as handle, handle.tokens(plain.visual(whole)):
        want = model(input_ids=whole, use_cache=False).logits[0]
        cache = None
        for part in parts:
            out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[0, -3:], want[-3:], **CLOSE)


def turns(model, handle, parts):
    """Logits of the last column after several ragged turns with a cache."""
    cache, masks = None, []
    for rows in parts:
        inputs = plain.batch(rows)
        width = inputs["input_ids"].shape[1]
        masks.append(inputs["attention_mask"])
        mask = torch.cat(masks, 1)
        number = {name: value[:, -width:] for name, value in plain.positions(model, mask).items()}
        where = torch.nn.functional.pad(plain.visual(inputs["input_ids"]), (mask.shape[1] - width, 0))
        with handle.tokens(where):
            out = model(
                input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True, **number
            )
        cache = out.past_key_values
    return out.logits[:, -1]


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("spec", ["uni_1_0.5-uni_3_0.25", "uni_0_0.5"])
def test_ragged_turns(language, spec, position):
    """Text, videos, text and videos again; padding lies in the middle of the rows."""
    model = language("qwen2")
    parts = [plain.rows([[], [], []]), GIVEN, plain.rows([[], [], []], 9), plain.rows([[9], [8], [20]], 11)]
    with vidtok.attach(model, decoder=spec, position=position) as handle:
        got = turns(model, handle, parts)
        for i in range(3):
            torch.testing.assert_close(got[i : i + 1], turns(model, handle, [[p[i]] for p in parts]), **CLOSE)


def test_windows_over_new_padding_are_refused(language):
    """A later turn in which one row loses more than another, though both came equally long."""
    model = language("mistral")
    first = [[7, 8, 9, 10], [11, 12, 13, 14]]
    even = [[20, *range(200, 208), 30, 31], [21, *range(208, 216), 32, 33]]
    uneven = [even[0], [21, 22, 23, 24, 25, *range(208, 212), 32, 33]]
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        turns(model, handle, [first, even])
        with pytest.raises(ValueError, match="expected a later turn whose rows lose as many tokens each"):
            turns(model, handle, [first, uneven])
        turns(model, handle, [uneven])
