"""Kept tokens of models with one row of positions, against the language model run by hand on what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import test_zoo, tiny
from vidtok.models import attach, families
from vidtok.models.visual import InputHook

far, logits = test_zoo.far, test_zoo.logits
NAMES = [n for n in test_zoo.TAKEN if families.FAMILIES[n].positions == "rope" and not families.FAMILIES[n].base_masks]


def reduced(model, inputs):
    """Last hidden states of an attached model, the columns that are kept, and what has one entry per kept token."""
    places, plans, seen = families.locate(model), [], {}

    def method(features, grids):
        plans.append(tiny.drop(features, grids))
        return plans[-1]

    def look(module, args, kwargs):
        arguments = families.named_arguments(module, args, kwargs)
        seen["visual"] = families.find_visual(places.family, module, arguments, False, {})

    language_model = places.language_model
    hooks = [
        places.base.register_forward_pre_hook(look, with_kwargs=True),
        language_model.register_forward_pre_hook(lambda m, a, k: seen.update(arguments=k), with_kwargs=True),
    ]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    hook = language_model.register_forward_hook(lambda m, a, out: seen.update(hidden=out.last_hidden_state))
    with attach(model, visual=method):
        logits(model, inputs)
    hook.remove()
    columns, length = seen["visual"].columns, inputs["input_ids"].shape[1]
    text = torch.ones(length, dtype=torch.bool)
    text[columns] = False
    kept = torch.cat([torch.nonzero(text).squeeze(1), columns[plans[0].anchor.long()]]).sort().values
    per_token = {
        k: v[:, kept]
        for k, v in seen["arguments"].items()
        if isinstance(v, Tensor) and v.shape[:2] == (1, length) and k not in ("attention_mask", "position_ids")
    }
    return seen["hidden"], kept, per_token


def by_hand(model, per_token, position):
    """Last hidden states of the language model on these tokens at these positions."""
    extra = {"cache_position": torch.arange(len(position))} if tiny.VERSION[0] == 4 else {}
    with torch.no_grad():
        return families.locate(model).language_model(
            **per_token,
            **extra,
            attention_mask=torch.ones(1, len(position), dtype=torch.long),
            position_ids=position[None],
            use_cache=False,
        )[0]


@pytest.mark.parametrize("name", NAMES)
def test_kept_positions(name):
    module = test_zoo.family(name)
    model, inputs = module.make(), module.row(module.batch(module.ROWS), module.ROWS, 1)
    got, kept, per_token = reduced(model, inputs)
    assert len(kept) < inputs["input_ids"].shape[1]
    assert far(got, by_hand(model, per_token, kept)) < 2e-5 * got.abs().max()
    assert far(got, by_hand(model, per_token, torch.arange(len(kept)))) > 1e-3 * got.abs().max()


def test_without_the_rotary_hook(monkeypatch):
    """Taken out, the tokens turn by the consecutive positions that the masks are made of."""
    module = test_zoo.family("llava_onevision")
    model, inputs = module.make(), module.row(module.batch(module.ROWS), module.ROWS, 1)
    monkeypatch.setattr(InputHook, "rotary_pre", lambda *_: None)
    got, kept, per_token = reduced(model, inputs)
    assert far(got, by_hand(model, per_token, kept)) > 1e-3 * got.abs().max()
