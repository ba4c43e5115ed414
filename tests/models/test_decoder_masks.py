"""Masks of the layers behind drops: frames whose tokens see each other both ways, windows, and masks of other forms."""

from __future__ import annotations

import importlib

import pytest
import torch

import vidtok
from tests.models import tiny
from vidtok.models import masks
from vidtok.models.run import Step

CLOSE = {"rtol": 0, "atol": 2e-5}
# Two layers behind the drop: what tokens see in the last one reaches no text token.
SPEC = "uni_1_0.5-uni_2_0.3"
NAMES = ["gemma3", "gemma4", "molmo2"]
NAMES = [n for n in NAMES if importlib.import_module(f"tests.models.zoo.{n}").MIN_VERSION <= tiny.VERSION]


@pytest.fixture(autouse=True)
def no_grad():
    """Nothing here trains."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def deep():
    """Four layers of a family and a batch."""
    made = {}

    def get(name):
        if name not in made:
            zoo = importlib.import_module(f"tests.models.zoo.{name}")
            made[name] = zoo, zoo.make(layers=4), zoo.batch(zoo.ROWS)
        return made[name]

    return get


@pytest.mark.parametrize("visual", [None, tiny.drop])
@pytest.mark.parametrize("name", NAMES)
def test_frames_that_see_themselves_both_ways(deep, name, visual, monkeypatch):
    zoo, model, inputs = deep(name)
    with vidtok.attach(model, visual=visual, decoder=SPEC):
        got, _ = tiny.generate(model, inputs, 3)
        for i in range(len(zoo.ROWS)):
            alone, _ = tiny.generate(model, zoo.row(inputs, zoo.ROWS, i), 3)
            torch.testing.assert_close(got[i : i + 1], alone, **CLOSE)
        torch.testing.assert_close(tiny.generate(model, inputs, 3, use_cache=False)[0], got, **CLOSE)
        if tiny.VERSION[0] > 4:
            static, _ = tiny.generate(model, inputs, 3, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, got, **CLOSE)
        monkeypatch.setattr(Step, "pairs", lambda *_: None)
        assert float((tiny.generate(model, inputs, 3)[0] - got).abs().max()) > 1e-3


def test_pairs_are_found_and_put_back():
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    frame = torch.tensor([0, 1, 1, 2, 2])
    pairs = (frame[:, None] == frame) & (frame[:, None] > 0)
    mask = causal | pairs
    found = masks.blocks(mask, 5, 0)
    assert torch.equal(found[0], pairs & ~torch.eye(5, dtype=torch.bool))
    assert masks.blocks(causal, 5, 0) is None
    hidden = torch.zeros(1, 5, 4)
    assert torch.equal(masks.with_blocks(None, found, hidden, 0, 0), mask)
    low = torch.finfo(torch.float32).min
    added = masks.with_blocks(torch.where(causal, 0.0, low), found, hidden, 0, None)
    assert torch.equal(masks.allowed(added), mask)
    # A static cache of nine columns, three of them filled before.
    wide = masks.with_blocks(torch.zeros(1, 1, 5, 9, dtype=torch.bool), found, hidden, 3, 3)
    assert torch.equal(wide[..., 3:8], found[:, None]) and not wide[..., 8].any() and not wide[..., :3].any()
    assert (
        masks.first_new("full_attention", 3, 9, 5, True) == 3
        and masks.first_new("sliding_attention", 3, 9, 5, False) == 4
    )
    with pytest.raises(ValueError, match="expected a cache that grows for a later turn"):
        masks.first_new("sliding_attention", 3, 9, 5, True)


@pytest.mark.skipif(not NAMES, reason="no family that makes its masks itself")
def test_masks_of_another_form_are_refused(deep, monkeypatch):
    """What a base model might make one day: a mask that is not causal between frames."""
    _, model, inputs = deep(NAMES[-1])
    made = masks.build

    def narrower(config, kind, hidden, *rest):
        mask = made(config, kind, hidden, *rest)
        return (
            masks.with_blocks(mask, None, hidden, 0, 0) & torch.ones(hidden.shape[1], hidden.shape[1]).triu(-9).bool()
        )

    with vidtok.attach(model, decoder=SPEC):
        model(**inputs)
        monkeypatch.setattr(masks, "build", narrower)
        with pytest.raises(
            ValueError, match="expected masks that are causal but for tokens that see each other both ways"
        ):
            model(**inputs)
