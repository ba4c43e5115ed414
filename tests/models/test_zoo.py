"""Every family of the zoo: the unreduced model is sound, and what is attached to it changes only what it says."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

import pytest
import torch

from tests.models import tiny, zoo
from vidtok.models import attach
from vidtok.models.families import FAMILIES

MODULES = {m.name: f"tests.models.zoo.{m.name}" for m in pkgutil.iter_modules(zoo.__path__) if m.name[0] != "_"}


def family(name):
    """The zoo's module of a family that the installed transformers has."""
    return importlib.import_module(MODULES[name])


def available():
    """Families that the installed transformers has."""
    return [n for n in sorted(MODULES) if tiny.VERSION >= family(n).MIN_VERSION]


NAMES = available()
TAKEN = [n for n in NAMES if n in FAMILIES]
CHUNKS = "prefill_chunk_size|[Cc]hunked prefill|not subscriptable"


@lru_cache(maxsize=2)
def made(name, attention="sdpa"):
    """Model and batch of a family."""
    module = family(name)
    return module.make(attention), module.batch(module.ROWS)


def logits(model, inputs):
    """Logits of a forward without cache."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def far(a, b):
    """Largest difference."""
    return (a - b).abs().max().item()


def uncached(model, inputs, tokens, answers=False):
    """Logits of the steps, each computed from the start: ``[1, steps, V]``; labels tell ``answers`` from the prompt."""
    out = []
    for n in range(tokens.shape[1]):
        grown = {k: grow(k, v, tokens[:, :n]) for k, v in inputs.items()}
        if answers and n:
            labels = torch.full_like(inputs["input_ids"], -100)
            grown["labels"] = torch.cat([labels, tokens[:, :n]], 1)
        out.append(logits(model, grown)[:, -1])
    return torch.stack(out, 1)


def grow(name, value, tokens):
    """An argument of a prompt to which ``tokens`` were added."""
    if name == "input_ids":
        return torch.cat([value, tokens], 1)
    if name == "attention_mask":
        return torch.cat([value, torch.ones_like(tokens)], 1)
    if name.endswith("token_type_ids"):
        return torch.cat([value, torch.zeros_like(tokens, dtype=value.dtype)], 1)
    return value


@pytest.mark.parametrize("name", NAMES)
class TestUnreduced:
    """What the rest is measured by."""

    def test_rows(self, name):
        module, (model, inputs) = family(name), made(name)
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits
        assert out.isfinite().all() and out.abs().max() < 1e3
        for i in range(len(module.ROWS)):
            real = inputs["attention_mask"][i].bool()
            assert (
                far(out[i, real], logits(model, module.row(inputs, module.ROWS, i))[0]) < 2e-5 * out.abs().max() + 2e-5
            )

    def test_cache(self, name):
        module, (model, inputs) = family(name), made(name)
        got, out = tiny.generate(model, inputs, 3)
        for i in range(len(module.ROWS)):
            one = module.row(inputs, module.ROWS, i)
            tokens = out.sequences[i : i + 1, -3:]
            assert far(got[i : i + 1], uncached(model, one, tokens)) < 1e-4 * got.abs().max() + 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TAKEN)
class TestVisual:
    """Reduction before the first layer."""

    def test_keep_all(self, name, attention):
        model, inputs = made(name, attention)
        before = logits(model, inputs)
        with attach(model, visual=tiny.keep_all):
            assert torch.equal(before, logits(model, inputs))
        assert torch.equal(before, logits(model, inputs))

    def test_rows(self, name, attention):
        module, (model, inputs) = family(name), made(name, attention)
        whole, _ = tiny.generate(model, inputs, 3)
        right = module.batch(module.ROWS, side="right")
        pixels = next(k for k, v in inputs.items() if k.startswith("pixel_values"))
        with attach(model, visual=tiny.drop) as handle:
            got, out = tiny.generate(model, inputs, 3)
            assert sum(s.tokens_out for s in handle.report().samples) < sum(
                s.tokens_in for s in handle.report().samples
            )
            assert len(handle.report().samples) == sum(map(len, module.ROWS))
            scale = got.abs().max()
            for i in range(len(module.ROWS)):
                one = module.row(inputs, module.ROWS, i)
                tokens = out.sequences[i : i + 1, -3:]
                assert far(got[i : i + 1], uncached(model, one, tokens)) < 2e-5 * scale
            assert far(logits(model, right)[range(3), -1], got[:, 0]) < 2e-5 * scale
            assert (got - whole).abs().amax((1, 2)).min() > 1e-3 * scale
            other, _ = tiny.generate(model, {**inputs, pixels: -inputs[pixels]}, 1)
            assert far(other, got[:, :1]) > 1e-3 * scale


def both_kinds(features, grid_thw):
    """Drop tokens of videos and of images."""
    return tiny.drop(features, grid_thw)


both_kinds.images = True


@pytest.mark.parametrize("name", [n for n in TAKEN if hasattr(family(n), "MIXED")])
class TestImages:
    """Images beside videos: whole, or reduced too."""

    @pytest.mark.parametrize("method", [tiny.drop, both_kinds])
    def test_rows(self, name, method):
        module, (model, _) = family(name), made(name)
        inputs = module.batch(module.MIXED)
        with attach(model, visual=method) as handle:
            got, out = tiny.generate(model, inputs, 2)
            kinds = [s.kind for s in handle.report().samples]
            assert kinds == [c[0] for clips in module.MIXED for c in clips if c[0] == "video" or method is both_kinds]
            for i in range(len(module.MIXED)):
                one = module.row(inputs, module.MIXED, i)
                alone = uncached(model, one, out.sequences[i : i + 1, -2:])
                assert far(got[i : i + 1], alone) < 2e-5 * got.abs().max()


@pytest.mark.parametrize("name", TAKEN)
class TestDecoder:
    """Reduction between the layers."""

    @pytest.mark.parametrize("kind", ["uni", "attn"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_rows(self, name, attention, kind):
        module, (model, inputs) = family(name), made(name, attention)
        spec = f"{kind}_{getattr(module, 'DROP_AT', 1)}_0.5"
        if kind in getattr(module, "REFUSED", {}):
            with pytest.raises(ValueError, match=module.REFUSED[kind]), attach(model, decoder=spec):
                logits(model, inputs)
            return
        whole, _ = tiny.generate(model, inputs, 3)
        right = module.batch(module.ROWS, side="right")
        pixels = next(k for k, v in inputs.items() if k.startswith("pixel_values"))
        with attach(model, decoder=spec):
            got, out = tiny.generate(model, inputs, 3)
            scale = got.abs().max()
            for i in range(len(module.ROWS)):
                one = module.row(inputs, module.ROWS, i)
                tokens = out.sequences[i : i + 1, -3:]
                assert far(got[i : i + 1], uncached(model, one, tokens, kind == "attn")) < 2e-5 * scale
            assert far(logits(model, right)[range(3), -1], got[:, 0]) < 2e-5 * scale
            assert (got - whole).abs().amax((1, 2)).min() > 1e-4 * scale
            other, _ = tiny.generate(model, {**inputs, pixels: -inputs[pixels]}, 1)
            assert far(other, got[:, :1]) > 1e-4 * scale
        assert torch.equal(tiny.generate(model, inputs, 1)[0], whole[:, :1])

    def test_both(self, name):
        module, (model, inputs) = family(name), made(name)
        if "uni" in getattr(module, "REFUSED", {}):
            return
        with attach(model, visual=tiny.drop):
            before, _ = tiny.generate(model, inputs, 3)
        with attach(model, visual=tiny.drop, decoder=f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"):
            got, out = tiny.generate(model, inputs, 3)
            scale = got.abs().max()
            for i in range(len(module.ROWS)):
                alone = uncached(model, module.row(inputs, module.ROWS, i), out.sequences[i : i + 1, -3:])
                assert far(got[i : i + 1], alone) < 2e-5 * scale
        assert (got - before).abs().amax((1, 2)).min() > 1e-4 * scale


@pytest.mark.skipif(tiny.VERSION < (5, 23), reason="older models mix up the features of beams")
@pytest.mark.parametrize("name", [n for n in TAKEN if getattr(family(n), "BEAMS", True)])
def test_beams(name):
    """Beam search over reduced rows finds what it finds in each row alone."""
    module, (model, inputs) = family(name), made(name)
    inside = None if "uni" in getattr(module, "REFUSED", {}) else f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"
    options = {"num_beams": 2, "max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
    with attach(model, visual=tiny.drop, decoder=inside):
        got = model.generate(**inputs, **options)
        for i in range(len(module.ROWS)):
            alone = model.generate(**module.row(inputs, module.ROWS, i), **options)
            assert torch.equal(got.sequences[i, -3:], alone.sequences[0, -3:])
            assert far(got.sequences_scores[i], alone.sequences_scores[0]) < 1e-5


@pytest.mark.skipif(tiny.VERSION < (5, 0), reason="older models take no cache of a prompt with pixels")
@pytest.mark.parametrize("hook", ["uni", "both"])
@pytest.mark.parametrize("name", TAKEN)
def test_turns(name, hook):
    """A second turn on the cache of the first is what the whole conversation gives."""
    module, (model, inputs) = family(name), made(name)
    if "uni" in getattr(module, "REFUSED", {}):
        return
    one = module.row(inputs, module.ROWS, 1)
    with attach(
        model,
        visual=tiny.drop if hook == "both" else None,
        decoder=f"uni_{getattr(module, 'DROP_AT', 1)}_0.5",
    ):
        _, first = tiny.generate(model, one, 2)
        more = torch.cat([first.sequences[:, -2:], torch.arange(11, 15)[None]], 1)
        longer = {k: grow(k, v, more) for k, v in one.items()}
        text = {k: v for k, v in longer.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        got, second = tiny.generate(model, text, 2, past_key_values=first.past_key_values)
        want = uncached(model, longer, second.sequences[:, -2:])
        assert far(got, want) < 2e-5 * got.abs().max()


@pytest.mark.skipif(tiny.VERSION < (5, 23), reason="older models cannot split their features")
@pytest.mark.parametrize("name", TAKEN)
def test_chunks_are_refused(name):
    """A prompt that comes in pieces may not be reduced piece by piece."""
    module, (model, inputs) = family(name), made(name)
    one = module.row(inputs, module.ROWS, 1)
    for options in ({"visual": tiny.drop}, {"decoder": f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"}):
        # Some models cannot do it themselves.
        with attach(model, **options), pytest.raises((ValueError, TypeError), match=CHUNKS):
            tiny.generate(model, one, 1, prefill_chunk_size=16)


def trained(model, inputs, labels, again=None):
    """Loss and gradients of a step in training mode; ``again`` tells how layers are recomputed."""
    model.train()
    if again is not None:
        model.gradient_checkpointing_enable({"use_reentrant": again})
    try:
        loss = model(**inputs, labels=labels.clone(), use_cache=False).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad()
        model.eval()
        if again is not None:
            model.gradient_checkpointing_disable()


@pytest.mark.parametrize("name", TAKEN)
def test_training(name):
    """Loss of the reduced rows, and the same gradients when layers are recomputed in the backward pass."""
    module, (model, inputs) = family(name), made(name)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    inside = None if "uni" in getattr(module, "REFUSED", {}) else f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"
    with attach(model, visual=tiny.drop, decoder=inside):
        short = logits(model, inputs)[:, -4:-1]
        want = torch.nn.functional.cross_entropy(short.flatten(0, 1), ids[:, -3:].flatten()).item()
        loss, grads = trained(model, inputs, labels)
        # Gemma 3n divides by the magnitude of padding, reduced or not.
        grads = {n: g for n, g in grads.items() if g.isfinite().all()}
        assert abs(loss - want) < 1e-5 and grads
        if not model.supports_gradient_checkpointing:
            return
        for reentrant in (False, True):
            again, other = trained(model, inputs, labels, reentrant)
            assert abs(again - want) < 1e-5
            assert grads.keys() <= other.keys()
            scale = max(g.abs().max() for g in grads.values())
            assert max(far(grads[n], other[n]) for n in grads) < 2e-5 * scale
