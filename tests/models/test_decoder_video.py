"""Drops inside the decoders of Qwen's video-language models: generation, turns, and reductions at the input as well."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import vidtok
from tests.models import flash, tiny
from vidtok.models import visual

CLOSE = {"rtol": 0, "atol": 2e-5}
SPECS = dict.fromkeys(tiny.KINDS, "uni_1_0.5-attn_2_0.3") | {"qwen3_vl": "attn_2_0.5"}
METHODS = {"none": None, "drop": tiny.drop, "merge": tiny.merge}


@pytest.fixture(autouse=True)
def no_grad():
    """Nothing here trains."""
    with torch.no_grad():
        yield


def alone(model, inputs, samples, out, steps=5):
    """Logits of each row by itself, fed the tokens that the batch chose."""
    logits = []
    for i in range(len(samples)):
        one, made = tiny.generate(model, tiny.row(inputs, samples, i), steps)
        assert torch.equal(made.sequences[0, -steps:], out.sequences[i, -steps:])
        logits.append(one)
    return torch.cat(logits)


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_batch_equals_each_row_alone(models, kind, attention, method, position):
    model = models(kind, attention)
    inputs = tiny.batch(kind, tiny.ROWS)
    before, _ = tiny.generate(model, inputs)
    with vidtok.attach(model, visual=METHODS[method], decoder=SPECS[kind], position=position):
        got, out = tiny.generate(model, inputs)
        torch.testing.assert_close(got, alone(model, inputs, tiny.ROWS, out), **CLOSE)
    assert float((got - before).abs().max()) > 1e-2
    assert torch.equal(tiny.generate(model, inputs)[0], before)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cached_equals_uncached(models, kind, method):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS)
    spec = "uni_2_0.3" if kind == "qwen3_vl" else "uni_1_0.5-uni_2_0.3"
    with vidtok.attach(model, visual=METHODS[method], decoder=spec):
        got, _ = tiny.generate(model, inputs)
        torch.testing.assert_close(tiny.generate(model, inputs, use_cache=False)[0], got, **CLOSE)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_images_have_budgets_of_their_own(models, kind):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.MIXED)
    with vidtok.attach(model, visual="uniform:ratio=0.5", decoder="uni_2_0.5") as handle:
        got, out = tiny.generate(model, inputs)
        torch.testing.assert_close(got, alone(model, inputs, tiny.MIXED, out), **CLOSE)
        samples = tiny.generate(model, inputs)[0] is not None and handle.report().samples
    for sample in samples:
        assert sample.at(2).num_out == max(1, sample.tokens_out // 2)
        assert sample.tokens_out == (sample.tokens_in if sample.kind == "image" else sample.tokens_in // 2)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_pixels_matter(models, kind):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS)
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    with vidtok.attach(model, decoder=SPECS[kind]):
        assert float((tiny.generate(model, inputs)[0] - tiny.generate(model, other)[0]).abs().max()) > 1e-3


# ---------------------------------------------------------------------- ways of generating
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_beams(models, kind):
    """Rows of beams are reordered in every layer: the cached search finds what the uncached one finds."""
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:2])
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    with vidtok.attach(model, decoder="uni_1_0.5-uni_2_0.3"):
        cached = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prompt_lookup_and_assisted_decoding(models, kind):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:1])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -3:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 3).int()], 1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1}
    with vidtok.attach(model, decoder="uni_2_0.3"):
        plain = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), plain)


@pytest.mark.parametrize("kind", [k for k in tiny.KINDS if tiny.VERSION[0] > 4 or k != "qwen2_vl"])
def test_candidates_do_not_ask(models, kind, monkeypatch):
    """The first pass of assisted decoding holds candidates behind the prompt, whose last token asks nevertheless."""
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:1])
    draft = tiny.make(kind, layers=1, seed=5)
    with vidtok.attach(model, decoder="attn_2_0.3"):
        plain, _ = tiny.generate(model, inputs, 6, eos_token_id=1)
        got, _ = tiny.generate(model, inputs, 6, eos_token_id=1, assistant_model=draft)
        torch.testing.assert_close(got, plain, **CLOSE)
        monkeypatch.setattr(visual, "_candidates", lambda *_: None)
        got, _ = tiny.generate(model, inputs, 6, eos_token_id=1, assistant_model=draft)
        assert float((got - plain).abs().max()) > 1e-3


def test_candidates_are_refused_with_a_compressed_cache(models):
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    drop = vidtok.Drop("uni_2_0.3", compress=True)
    with vidtok.attach(model, decoder=drop), pytest.raises(ValueError, match="candidates of assisted decoding"):
        tiny.generate(model, inputs, 6, eos_token_id=1, assistant_model=tiny.make("qwen2_5_vl", layers=1, seed=5))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_several_samples_per_prompt(models, kind):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:2])
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with vidtok.attach(model, decoder="uni_1_0.5-uni_2_0.3"):
        greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**inputs, **options), greedy.repeat_interleave(2, 0))


@pytest.mark.skipif(tiny.VERSION[0] < 5, reason="refused there")
@pytest.mark.parametrize("method", ["none", "drop"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_static_cache(models, kind, method):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS)
    with vidtok.attach(model, visual=METHODS[method], decoder=SPECS[kind]):
        dynamic, _ = tiny.generate(model, inputs)
        static, _ = tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, dynamic, **CLOSE)


@pytest.mark.skipif(tiny.VERSION[0] > 4, reason="works there")
def test_static_cache_is_refused(models):
    model = models("qwen2_vl")
    inputs = tiny.batch("qwen2_vl", tiny.ROWS)
    refused = pytest.raises(ValueError, match="expected a cache that grows, got a static one")
    with vidtok.attach(model, decoder="uni_1_0.5"), refused:
        tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_flash_attention(kind):
    """No layer takes the gaps of kept positions for borders between packed rows."""
    inputs = tiny.batch(kind, tiny.ROWS)
    first = tiny.row(inputs, tiny.ROWS, 0)
    with flash.installed():
        model, other = tiny.make(kind, "flash_attention_2"), tiny.make(kind, "sdpa")
        for method in METHODS.values():
            with vidtok.attach(model, visual=method, decoder=SPECS[kind]):
                got = tiny.generate(model, inputs)[0], model(**first, use_cache=False).logits
            with vidtok.attach(other, visual=method, decoder=SPECS[kind]):
                want = tiny.generate(other, inputs)[0], other(**first, use_cache=False).logits
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, **CLOSE)


# ---------------------------------------------------------------------- turns
@pytest.mark.parametrize("method", ["none", "drop"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_second_turn_of_text(models, kind, method):
    """The cached second turn equals a recomputation of everything."""
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:1])
    with vidtok.attach(model, visual=METHODS[method], decoder="uni_2_0.3"):
        _, out = tiny.generate(model, inputs)
        turn = torch.cat([out.sequences, torch.tensor([[9, 33, 71]])], 1)
        whole = {**inputs, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
        if "mm_token_type_ids" in inputs:
            more = turn.shape[1] - inputs["input_ids"].shape[1]
            whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
        want, _ = tiny.generate(model, whole, 3)
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        later = {name: whole[name] for name in names if name in whole}
        got, _ = tiny.generate(model, later, 3, past_key_values=out.past_key_values)
    torch.testing.assert_close(got, want, **CLOSE)


def test_copies_of_a_cache_part(models):
    """Two continuations of one prompt do not see each other."""
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    with vidtok.attach(model, decoder=SPECS["qwen2_5_vl"]):
        _, out = tiny.generate(model, inputs, 2)
        ids = torch.cat([out.sequences, torch.tensor([[9], [8], [7]])], 1)
        given = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 3).long()], 1)}
        first = copy.deepcopy(out.past_key_values)
        a, _ = tiny.generate(model, given, 3, past_key_values=out.past_key_values)
        b, _ = tiny.generate(model, given, 3, past_key_values=first)
    assert torch.equal(a, b)


def test_two_threads(models):
    """Two attached models, called at the same time, do not meet."""
    names = ("qwen2_vl", "qwen2_5_vl")
    inputs = {name: tiny.batch(name, tiny.ROWS) for name in names}
    handles = [vidtok.attach(models(name), decoder=SPECS[name]) for name in names]
    want = {name: tiny.generate(models(name), inputs[name], 3)[0] for name in names}
    got = {name: [] for name in names}

    def ask(name):
        with torch.no_grad():
            got[name] += [tiny.generate(models(name), inputs[name], 3)[0] for _ in range(4)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.restore()
    assert all(len(got[name]) == 4 and all(torch.equal(x, want[name]) for x in got[name]) for name in names)


def test_an_error_leaves_nothing(models, monkeypatch):
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    before, _ = tiny.generate(model, inputs, 2)
    with vidtok.attach(model, decoder=SPECS["qwen2_5_vl"]):
        good, _ = tiny.generate(model, inputs, 2)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.language_model.layers[2].mlp, "forward", None)
            with pytest.raises(TypeError):
                tiny.generate(model, inputs, 2)
        assert torch.equal(tiny.generate(model, inputs, 2)[0], good)
    assert torch.equal(tiny.generate(model, inputs, 2)[0], before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_leaves_text_alone(models, error):
    model = models("qwen2_vl")
    inputs = tiny.batch("qwen2_vl", tiny.ROWS)
    text = {"input_ids": inputs["input_ids"].clamp(max=200)}
    before = model(**text).logits

    def stop(*_):
        raise error("stop")

    with vidtok.attach(model, decoder=SPECS["qwen2_vl"]):
        hook = model.model.language_model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(error, match="stop"):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**text).logits, before)


# ---------------------------------------------------------------------- refusals
def test_drops_among_the_layers_of_deepstack_are_refused(models):
    model = models("qwen3_vl")
    inputs = tiny.batch("qwen3_vl", tiny.ROWS)
    with (
        vidtok.attach(model, decoder="uni_1_0.5"),
        pytest.raises(ValueError, match="expected drops at layer 2 or later"),
    ):
        model(**inputs)


def test_chunked_prefill_is_refused(models):
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    refused = pytest.raises(ValueError, match="prefill_chunk_size")
    with vidtok.attach(model, decoder="uni_1_0.5"), refused:
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


def test_logits_of_chosen_columns_are_refused(models):
    model = models("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    refused = pytest.raises(ValueError, match="logits_to_keep as a number")
    with vidtok.attach(model, decoder="uni_1_0.5"), refused:
        model(**inputs, logits_to_keep=torch.tensor([3, 4]))
