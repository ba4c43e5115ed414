"""An attachment leaves no trace outside the calls that it serves."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref

import pytest
import torch

import vidtok
from tests.models import tiny


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(params=tiny.KINDS)
def fresh(request):
    return request.param, tiny.make(request.param, layers=1)


def test_the_model_looks_the_same(fresh, tmp_path):
    kind, model = fresh
    inputs = tiny.batch(kind, tiny.ROWS)
    plain = model(**inputs).logits
    keys, cls, attributes = list(model.state_dict()), type(model), set(vars(model))
    modules = [type(m) for m in model.modules()]
    before = hooks(model)
    with vidtok.attach(model, visual=tiny.drop):
        reduced = model(**inputs).logits
        assert list(model.state_dict()) == keys
        assert type(model) is cls
        assert set(vars(model)) == attributes
        assert [type(m) for m in model.modules()] == modules
        assert inspect.signature(model.forward) == inspect.signature(cls.forward.__get__(model))
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, plain)
        with vidtok.attach(twin, visual=tiny.drop):
            assert torch.equal(twin(**inputs).logits, reduced)
        assert torch.equal(model(**inputs).logits, reduced)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, plain)
    assert hooks(model) == before
    assert torch.equal(model(**inputs).logits, plain)
    loaded = cls.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, plain, rtol=0, atol=1e-5)


def test_second_attachment_raises(fresh):
    kind, model = fresh
    inputs = tiny.batch(kind, tiny.ROWS[:1])
    handle = vidtok.attach(model, visual=tiny.drop)
    reduced = model(**inputs).logits
    with pytest.raises(ValueError, match="without attachment"):
        vidtok.attach(model, visual=tiny.merge)
    assert torch.equal(model(**inputs).logits, reduced)
    handle.restore()
    handle.restore()
    assert not handle.active
    assert hooks(model) == 0
    vidtok.attach(model, visual=tiny.merge).restore()


def test_bad_arguments(models):
    model = models("qwen2_5_vl")
    before = hooks(model)
    for options, message in (
        ({"visual": tiny.drop, "vision": "tome:r=-1"}, "at least 0"),
        ({"visual": tiny.drop, "decoder": "uni_2"}, "uni_2"),
        ({"visual": tiny.drop, "position": "first"}, "position"),
        ({}, "visual="),
    ):
        with pytest.raises(ValueError, match=message):
            vidtok.attach(model, **options)
    assert hooks(model) == before


def test_exceptions_leave_no_state(models):
    kind = "qwen2_5_vl"
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    text = tiny.batch(kind, [[], []])
    plain_text, _ = tiny.generate(model, text)
    fail = {"at": None}

    def method(features, grid_thw):
        if fail["at"] == "method":
            raise RuntimeError("method")
        return tiny.drop(features, grid_thw)

    def layer(module, args, kwargs):
        if fail["at"] == "layer":
            raise RuntimeError("layer")
        if fail["at"] == "interrupt":
            raise KeyboardInterrupt

    hook = model.model.language_model.layers[1].register_forward_pre_hook(layer, with_kwargs=True)
    try:
        with vidtok.attach(model, visual=method):
            right, _ = tiny.generate(model, inputs)
            for at, error in (("method", RuntimeError), ("layer", RuntimeError), ("interrupt", KeyboardInterrupt)):
                fail["at"] = at
                with pytest.raises(error):
                    tiny.generate(model, inputs)
                with pytest.raises(error):
                    model(**inputs, labels=inputs["input_ids"])
                fail["at"] = None
                again, _ = tiny.generate(model, text)
                assert torch.equal(again, plain_text)
                again, _ = tiny.generate(model, inputs)
                assert torch.equal(again, right)
        fail["at"] = "layer"
        with pytest.raises(RuntimeError), vidtok.attach(model, visual=method):
            tiny.generate(model, inputs)
        fail["at"] = None
        again, _ = tiny.generate(model, text)
        assert torch.equal(again, plain_text)
    finally:
        hook.remove()


def test_two_threads_two_models():
    made = [tiny.make("qwen2_5_vl", layers=2, seed=s) for s in range(2)]
    batches = [tiny.batch("qwen2_5_vl", tiny.ROWS), tiny.batch("qwen2_5_vl", tiny.ROWS[::-1])]
    handles = [vidtok.attach(m, visual=v) for m, v in zip(made, (tiny.drop, tiny.merge))]
    right = [tiny.generate(m, b)[0] for m, b in zip(made, batches)]
    wrong, barrier = [], threading.Barrier(2)

    def work(i):
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(4):
            if not torch.equal(tiny.generate(made[i], batches[i])[0], right[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    for h in handles:
        h.restore()


def test_calls_may_interleave(models):
    model = models("qwen2_5_vl")
    inputs = [tiny.batch("qwen2_5_vl", tiny.ROWS[i : i + 1]) for i in range(3)]
    token = torch.tensor([[30]])

    def step(cache, length):
        more = {"cache_position": torch.tensor([length])} if tiny.VERSION[0] == 4 else {}
        return model(input_ids=token, past_key_values=cache, position_ids=torch.full((3, 1, 1), 60), **more).logits

    with vidtok.attach(model, visual=tiny.drop):
        alone = []
        for x in inputs:
            alone.append(step(model(**x).past_key_values, x["input_ids"].shape[1]))
        caches = [model(**x).past_key_values for x in inputs]
        mixed = [step(c, x["input_ids"].shape[1]) for c, x in zip(caches, inputs)]
    for a, b in zip(alone, mixed):
        assert torch.equal(a, b)


def test_nothing_keeps_a_restored_model_alive():
    model = tiny.make("qwen2_5_vl", layers=1)
    handle = vidtok.attach(model, visual=tiny.drop)
    tiny.generate(model, tiny.batch("qwen2_5_vl", tiny.ROWS[:1]), steps=2)
    handle.restore()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_specs_are_resolved(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    before = hooks(model)
    with vidtok.attach(model, visual="uniform:ratio=0.5") as handle:
        tiny.generate(model, inputs)
        assert all(s.tokens_out == max(1, s.tokens_in // 2) for s in handle.report().samples)
        assert "uniform" in repr(handle)
    with pytest.raises(ValueError):
        vidtok.attach(model, visual="unifrom:ratio=0.5")
    assert hooks(model) == before


def test_an_attachment_without_a_handle_can_be_taken_out(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    before, plain = hooks(model), model(**inputs, use_cache=False).logits
    vidtok.attach(model, visual=tiny.drop)
    gc.collect()
    assert model(**inputs, use_cache=False).logits.shape[1] < plain.shape[1]
    with pytest.raises(ValueError, match="detach"):
        vidtok.attach(model, visual=tiny.drop)
    assert vidtok.detach(model.model) and not vidtok.detach(model)
    assert hooks(model) == before and torch.equal(model(**inputs, use_cache=False).logits, plain)
