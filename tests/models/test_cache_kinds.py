"""Every kind of cache is served or refused in one sentence; the public one counts both lengths."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vidtok
from tests.models import tiny
from vidtok.models import cache as caches

CLOSE = {"rtol": 0, "atol": 2e-5}
HOOKS = {"visual": {"visual": "uniform:ratio=0.5"}, "uni": {"decoder": "uni_2_0.5"}, "attn": {"decoder": "attn_2_0.5"}}
TEXT = torch.arange(20, 27)[None]


@pytest.fixture(params=list(HOOKS))
def hook(request):
    """What is attached."""
    return HOOKS[request.param]


def text(model):
    """The config that caches are made from."""
    return model.config.get_text_config(decoder=True)


def grown(hook, kind="qwen2_5_vl", rows=3, **options):
    """Model, inputs and what a growing cache gives."""
    model, inputs = tiny.make(kind, **options), tiny.batch(kind, tiny.ROWS[:rows])
    with vidtok.attach(model, **hook):
        return model, inputs, tiny.generate(model, inputs)[0]


def exact_layer():
    """A quantised layer whose quantisation loses nothing."""
    from transformers import cache_utils

    class Exact(cache_utils.QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor.clone()

        def _dequantize(self, tensor):
            return tensor

    return Exact(residual_length=4)


# ---------------------------------------------------------------------- kinds
@pytest.mark.parametrize("given", ["config", "bare"])
def test_growing(hook, given):
    from transformers import DynamicCache

    model, inputs, right = grown(hook)
    cache = DynamicCache(config=text(model)) if given == "config" else DynamicCache()
    with vidtok.attach(model, **hook):
        torch.testing.assert_close(tiny.generate(model, inputs, past_key_values=cache)[0], right, **CLOSE)


@pytest.mark.parametrize("window", [None, 24])
def test_static(hook, window):
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model, inputs, right = grown(hook, "qwen2_vl", **sliding)
    with vidtok.attach(model, **hook):
        options = {"cache_implementation": "static", "disable_compile": True}
        if tiny.VERSION[0] == 4 and "decoder" in hook:
            with pytest.raises(ValueError, match="expected a cache that grows") as error:
                tiny.generate(model, inputs, **options)
            assert "\n" not in str(error.value)
        else:
            torch.testing.assert_close(tiny.generate(model, inputs, **options)[0], right, **CLOSE)


@pytest.mark.parametrize("window", [8, 24])
def test_sliding(hook, window):
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    model, inputs, right = grown(hook, "qwen2_vl", **sliding)
    layers = text(model).layer_types
    assert "sliding_attention" in layers and "full_attention" in layers
    with vidtok.attach(model, **hook):
        uncached, _ = tiny.generate(model, inputs, 2, use_cache=False)
        for i in range(3):
            one, _ = tiny.generate(model, tiny.row(inputs, tiny.ROWS, i))
            torch.testing.assert_close(one[0], right[i], **CLOSE)
    steps = 1 if "attn" in str(hook) else 2
    torch.testing.assert_close(uncached[:, :steps], right[:, :steps], **CLOSE)


def test_quantised(hook):
    from transformers import Cache

    model, inputs, right = grown(hook)
    cache = Cache(layers=[exact_layer() for _ in range(text(model).num_hidden_layers)])
    with vidtok.attach(model, **hook):
        got, out = tiny.generate(model, inputs, past_key_values=cache)
        torch.testing.assert_close(got, right, **CLOSE)
        assert out.past_key_values.physical_lengths[0] < out.past_key_values.logical_length or "decoder" in hook


def test_quantised_to_8_bits(hook):
    """The backend of transformers itself; wrong columns would differ by tens of times as much."""
    from transformers import QuantizedCache, cache_utils

    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        return
    model, inputs, right = grown(hook)
    with vidtok.attach(model, **hook):
        cache = QuantizedCache(backend="fp8", config=text(model))
        got, _ = tiny.generate(model, inputs, 2, past_key_values=cache)
    plain, _ = tiny.generate(model, inputs, 2)
    torch.testing.assert_close(got[:, 0], right[:, 0], **CLOSE)
    assert (got[:, 1] - right[:, 1]).abs().max() < 0.1 < (plain[:, 1] - right[:, 1]).abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tries it where it works")
def test_offloaded_without_a_gpu(hook):
    from transformers import DynamicCache

    model, inputs, right = grown(hook)
    with vidtok.attach(model, **hook):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            tiny.generate(model, inputs, past_key_values=DynamicCache(config=text(model), offloading=True))
        assert "\n" not in str(error.value)
        assert torch.equal(tiny.generate(model, inputs)[0], right)


def test_pairs_of_another_kind_are_refused(hook):
    from transformers import DynamicCache, EncoderDecoderCache

    model, inputs = tiny.make("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    tuples = ((torch.zeros(1, 2, 3, 16),) * 2,) * 3
    for cache in (tuples, EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with vidtok.attach(model, **hook), pytest.raises((TypeError, AttributeError, ValueError)) as error:
            model(**inputs, past_key_values=cache)
        assert "\n" not in str(error.value)
    plain = tiny.make("qwen2_5_vl")
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


# ---------------------------------------------------------------------- the public cache
def turns(model, cache, inputs, steps=3):
    """Two turns on one cache; logits of the second."""
    _, first = tiny.generate(model, inputs, steps, past_key_values=cache)
    new = TEXT.expand(inputs["input_ids"].shape[0], -1)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1])], 1)
    return tiny.generate(model, {"input_ids": ids, "attention_mask": mask.long()}, steps, past_key_values=cache)[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_two_turns(models, hook, kind, rows):
    from transformers import DynamicCache

    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS[:rows])
    cache = vidtok.LogicalCache(config=text(model))
    assert isinstance(cache, DynamicCache) and cache.logical_length == 0
    with vidtok.attach(model, **hook):
        got = turns(model, cache, inputs)
        right = turns(model, DynamicCache(config=text(model)), inputs)
        torch.testing.assert_close(got, right, **CLOSE)
    fed = inputs["input_ids"].shape[1] + 3 + 7 + 2
    assert type(cache).__name__ == "LogicalCache" and cache.logical_length == cache.get_seq_length() == fed
    held = cache.physical_lengths
    assert held == [layer.keys.shape[-2] for layer in cache.layers]
    assert (held[0] < fed) == ("visual" in hook) and held[-1] < fed
    assert "LogicalCache" in repr(type(copy.deepcopy(cache))) and copy.deepcopy(cache).physical_lengths == held


def test_the_second_turn_needs_the_logical_length(models, monkeypatch):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    with vidtok.attach(model, visual="uniform:ratio=0.5"):
        right = turns(model, vidtok.LogicalCache(config=text(model)), inputs)
        monkeypatch.setattr(caches.TwoLengths, "get_seq_length", caches.TwoLengths.get_query_offset)
        try:
            wrong = turns(model, vidtok.LogicalCache(config=text(model)), inputs)
        except (RuntimeError, ValueError):
            return
        assert not torch.allclose(wrong, right, atol=1e-2)


def test_without_attachment_it_is_a_growing_cache(models):
    model, inputs = models("qwen2_vl"), tiny.batch("qwen2_vl", tiny.ROWS)
    plain, _ = tiny.generate(model, inputs)
    cache = vidtok.LogicalCache(config=text(model))
    assert torch.equal(tiny.generate(model, inputs, past_key_values=cache)[0], plain)
    assert cache.physical_lengths == [cache.logical_length] * len(cache.layers)


def test_after_the_attachment_is_gone(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    cache = vidtok.LogicalCache(config=text(model))
    with vidtok.attach(model, visual="uniform:ratio=0.5"):
        tiny.generate(model, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="start from an empty cache"):
        model(input_ids=TEXT, past_key_values=cache)
    cache.reset()  # older versions keep the columns and fill them with zeros
    assert cache.logical_length == cache.physical_lengths[0]


def test_subclasses_copies_and_pickles(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    mine = type("Mine", (vidtok.LogicalCache,), {})(config=text(model))
    with vidtok.attach(model, visual="uniform:ratio=0.5"):
        right = turns(model, vidtok.LogicalCache(config=text(model)), inputs)
        tiny.generate(model, inputs, 3, past_key_values=mine)
        copied = copy.deepcopy(mine)
        assert type(copied) is type(mine) and copied.physical_lengths == mine.physical_lengths
        copied.crop(inputs["input_ids"].shape[1])
        assert copied.logical_length == inputs["input_ids"].shape[1] < mine.logical_length
        torch.testing.assert_close(turns(model, type(mine)(config=text(model)), inputs), right, **CLOSE)
        with pytest.raises(ValueError, match="unreduced prompt"):
            pickle.dumps(continued(model, inputs))
    plain = vidtok.LogicalCache(config=text(model))
    tiny.generate(model, inputs, 3, past_key_values=plain)
    again = pickle.loads(pickle.dumps(plain))
    assert type(again) is vidtok.LogicalCache and again.logical_length == plain.logical_length


def continued(model, inputs):
    """A public cache that holds a reduced prompt."""
    cache = vidtok.LogicalCache(config=text(model))
    tiny.generate(model, inputs, 2, past_key_values=cache)
    return cache
