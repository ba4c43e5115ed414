"""What carries the arguments of single families, taken out: the checks of the zoo see it."""

from __future__ import annotations

import pytest
import torch

from tests.models import test_zoo, tiny
from vidtok.models import attach, following, layers, visual
from vidtok.models.families import _base

pytestmark = pytest.mark.skipif(tiny.VERSION < (5, 23), reason="families of transformers 5.23")
INSIDE = {"decoder": "uni_1_0.5"}
BEFORE = {"visual": tiny.drop}


def error(name, **hooks):
    """Distance of a ragged batch from its rows alone, in shares of the largest logit; infinite when it raises."""
    module, (model, inputs) = test_zoo.family(name), test_zoo.made(name)
    with attach(model, **hooks):
        try:
            got, out = tiny.generate(model, inputs, 3)
            far = 0.0
            for i in range(len(module.ROWS)):
                one, tokens = module.row(inputs, module.ROWS, i), out.sequences[i : i + 1, -3:]
                far = max(far, test_zoo.far(got[i : i + 1], test_zoo.uncached(model, one, tokens)))
        except (ValueError, RuntimeError, IndexError):
            return float("inf")
    return far / got.abs().max().item()


def seen(monkeypatch, name, hooks, *change):
    """Whether a change takes a family from right to wrong."""
    assert error(name, **hooks) < 2e-5
    monkeypatch.setattr(*change)
    return error(name, **hooks) > 1e-3


def test_kinds_of_tokens_follow(monkeypatch):
    """ERNIE sends visual tokens to experts of their own."""
    keep = staticmethod(lambda arguments, *rest: dict(arguments))
    assert seen(monkeypatch, "ernie4_5_vl_moe", BEFORE, visual.InputHook, "_carry", keep)


def test_deepstack_follows(monkeypatch):
    keep = staticmethod(lambda *arguments: None)
    assert seen(monkeypatch, "qwen3_vl_moe", BEFORE, visual.InputHook, "_deepstack", keep)


def test_frames_of_a_tower_are_joined(monkeypatch):
    """GLM's tower is given every frame alone."""
    assert seen(monkeypatch, "glm4v", BEFORE, _base, "joined", lambda rows, encoded: rows)


def test_padding_ends_what_comes_before(monkeypatch):
    """Qwen4 looks up token ids together with those before them."""
    module = test_zoo.family("qwen4_exp")
    model, inputs = module.make(layers=4), module.batch(module.ROWS)

    def far():
        with attach(model, decoder="uni_2_0.5"):
            got = test_zoo.logits(model, inputs)[:, -1]
            alone = [test_zoo.logits(model, module.row(inputs, module.ROWS, i))[0, -1] for i in range(len(got))]
        return test_zoo.far(got, torch.stack(alone)) / got.abs().max()

    assert far() < 2e-5
    monkeypatch.setattr(layers, "PADDED_WITH_EOS", ())
    monkeypatch.setattr(layers, "PER_TOKEN", layers.PER_TOKEN | {"ple_input_ids"})
    assert far() > 1e-4


def test_positions_of_keys_follow(monkeypatch):
    """Qwen4's index reads the positions of everything in the cache."""
    assert seen(monkeypatch, "qwen4_exp", INSIDE, following, "remembers", lambda cache: False)


def test_positions_of_arguments_stay(monkeypatch):
    """A reentrant checkpoint takes gradients of what comes by position: Gemma 4's embeddings of each layer."""
    module, (model, inputs) = test_zoo.family("gemma4"), test_zoo.made("gemma4")
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    spec = f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"
    with attach(model, decoder=spec):
        test_zoo.trained(model, inputs, labels, True)
    put = layers.put
    monkeypatch.setattr(layers, "put", lambda layer, hidden, arguments, count: put(layer, hidden, arguments, 1))
    with attach(model, decoder=spec), pytest.raises(RuntimeError, match="backward"):
        test_zoo.trained(model, inputs, labels, True)
