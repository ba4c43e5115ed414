"""Training through a reduction: labels, losses, gradients, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import vidtok
from tests.models import tiny
from vidtok.models import visual


def labelled(kind, side="left", rows=tiny.ROWS):
    """A batch whose last four tokens of every row are learnt."""
    inputs = tiny.batch(kind, rows, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        at = mask.nonzero().squeeze(1)[-4:]
        labels[i, at] = inputs["input_ids"][i, at]
    return inputs | {"labels": labels}


def cross_entropy_alone(model, inputs, rows=tiny.ROWS):
    """The loss of the reduced rows, each run alone, written out by hand."""
    total, count = 0.0, 0
    for i in range(len(rows)):
        row = tiny.row(inputs, rows, i)
        labels = row.pop("labels")
        logits = model(**row, use_cache=False).logits
        learnt = labels[0][labels[0] != -100]
        total = total + F.cross_entropy(logits[0, -len(learnt) - 1 : -1].float(), learnt, reduction="sum")
        count += len(learnt)
    return total / count


@pytest.mark.parametrize("method", [tiny.drop, tiny.merge], ids=["drop", "merge"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loss_is_that_of_the_rows_alone(models, kind, side, method):
    model, inputs = models(kind), labelled(kind, side)
    kept = inputs["labels"].clone()
    plain = model(**inputs, use_cache=False).loss
    with vidtok.attach(model, visual=method):
        out = model(**inputs, use_cache=False)
        expected = cross_entropy_alone(model, inputs)
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=5e-6)
    assert out.logits.shape[1] < inputs["labels"].shape[1]
    assert (out.loss - plain).abs() > 1e-4
    assert torch.equal(inputs["labels"], kept)


def test_num_items_in_batch_reaches_the_loss(models):
    model, inputs = models("qwen2_5_vl"), labelled("qwen2_5_vl")
    with vidtok.attach(model, visual=tiny.drop):
        mean = model(**inputs, use_cache=False).loss
        scaled = model(**inputs, use_cache=False, num_items_in_batch=torch.tensor(24)).loss
    torch.testing.assert_close(scaled, mean * 12 / 24)


def test_positional_arguments_and_tuples(models):
    model, inputs = models("qwen2_5_vl"), labelled("qwen2_5_vl")
    with vidtok.attach(model, visual=tiny.drop):
        named = model(**inputs, use_cache=False)
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "labels")}
        if tiny.VERSION[0] > 4:
            plain = model(
                inputs["input_ids"],
                inputs["attention_mask"],
                None,
                None,
                None,
                inputs["labels"],
                use_cache=False,
                **rest,
            )
            assert torch.equal(plain.loss, named.loss)
        loss, logits = model(**inputs, use_cache=False, return_dict=False)[:2]
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)


def test_first_real_token_is_not_learnt_from_padding(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"][inputs["input_ids"] == tiny.VIDEO] = -100
    with vidtok.attach(model, visual=tiny.drop):
        together = model(**inputs, use_cache=False).loss
        total, count = 0.0, 0
        for i in range(3):
            row = tiny.row(inputs, tiny.ROWS, i)
            n = int((row["labels"][:, 1:] != -100).sum())
            total, count = total + model(**row, use_cache=False).loss * n, count + n
    torch.testing.assert_close(together, total / count, rtol=0, atol=5e-6)
    # Without a reduction transformers does learn it, so the two rules differ on this batch.
    plain = model(**inputs, use_cache=False).loss
    alone = sum(
        model(**row, use_cache=False).loss * int((row["labels"][:, 1:] != -100).sum())
        for row in (tiny.row(inputs, tiny.ROWS, i) for i in range(3))
    )
    assert (plain - alone / count).abs() > 1e-4


def test_unshortened_labels_fail(models, monkeypatch):
    model, inputs = models("qwen2_5_vl"), labelled("qwen2_5_vl")
    monkeypatch.setattr(visual.InputHook, "outer_pre", lambda self, module, args, kwargs: None)
    with vidtok.attach(model, visual=tiny.drop), pytest.raises(ValueError):
        model(**inputs, use_cache=False)


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_and_checkpointing(models, kind):
    model, inputs = copy.deepcopy(models(kind)).train(), labelled(kind)
    with vidtok.attach(model, visual=tiny.merge):
        loss, plain = gradients(model, inputs)
        missing = {n for n, p in model.named_parameters() if p.requires_grad} - set(plain)
        assert not missing
        assert all(plain[n].abs().max() > 0 for n in plain if "visual" in n and "weight" in n and "norm" not in n)
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            again, checked = gradients(model, inputs)
            torch.testing.assert_close(again, loss)
            for name in plain:
                torch.testing.assert_close(checked[name], plain[name], rtol=1e-4, atol=1e-5)
            model.disable_input_require_grads()
            model.gradient_checkpointing_disable()


def test_gradients_are_those_of_finite_differences():
    model, inputs = tiny.make("qwen2_5_vl").double(), tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    weight = model.model.visual.merger.mlp[2].weight

    def loss():
        return model(**inputs, use_cache=False).logits[:, -1].logsumexp(-1).sum()

    with vidtok.attach(model, visual=tiny.merge):
        loss().backward()
        steepest = weight.grad / weight.grad.norm()
        with torch.no_grad():
            weight += 1e-3 * steepest
            up = loss()
            weight -= 2e-3 * steepest
            down = loss()
    torch.testing.assert_close(weight.grad.norm(), (up - down) / 2e-3, rtol=1e-2, atol=0)
