"""Drops inside the decoder in training: labels, gradients and checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vidtok
from tests.models import plain, tiny
from vidtok.models import decoder

GIVEN = plain.rows([[24], [12, 9], [17]])
CLOSE = {"rtol": 0, "atol": 2e-5}


def batch(side="left"):
    """Rows whose last three tokens are the answer."""
    inputs = plain.batch(GIVEN, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    place = mask.long().cumsum(1)
    answer = mask & (place > mask.sum(1, keepdim=True) - 3)
    return {**inputs, "labels": torch.where(answer, ids, -100)}


def step(model, inputs, spec, **options):
    """Loss and gradients of one step."""
    model.zero_grad()
    model.train()
    with vidtok.attach(model, decoder=spec, **options) as handle, handle.tokens(plain.visual(inputs["input_ids"])):
        number = plain.positions(model, inputs["attention_mask"])
        loss = model(**inputs, **number, use_cache=False).loss
        loss.backward()
    model.eval()
    model.gradient_checkpointing_disable()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, inputs, spec, position="keep"):
    """The same loss by running the layers one after another on each row alone."""
    model.zero_grad()
    total, count = 0.0, 0
    base = model.model
    stages = {int(part.split("_")[1]): float(part.split("_")[2]) for part in spec.split("-")}
    for i in range(len(GIVEN)):
        real = inputs["attention_mask"][i].bool()
        ids, labels = inputs["input_ids"][i][real], inputs["labels"][i][real]
        hidden = base.embed_tokens(ids)[None]
        place = torch.arange(len(ids))
        visual = plain.visual(ids)
        unit = torch.where(visual, (visual & ~F.pad(visual[:-1], (1, 0))).cumsum(0), 0)
        original = torch.bincount(unit)
        cos, sin = base.rotary_emb(hidden, place[None])
        for n, layer in enumerate(base.layers):
            if n in stages:
                keep = unit == 0
                for u in range(1, len(original)):
                    at = (unit == u).nonzero().squeeze(1)
                    left = max(1, int(stages[n] * int(original[u])))
                    chosen = [j * (len(at) - 1) // (left - 1) if left > 1 else 0 for j in range(left)]
                    keep[at[chosen]] = True
                hidden, cos, sin = hidden[:, keep], cos[:, keep], sin[:, keep]
                unit, labels = unit[keep], labels[keep]
                if position == "renumber":
                    cos, sin = base.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            out = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
            hidden = out[0] if isinstance(out, tuple) else out
        logits = model.lm_head(base.norm(hidden))[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    loss = total / count
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    """Equal losses and gradients."""
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=2e-6)
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], rtol=1e-3, atol=2e-6)


@pytest.fixture(scope="module")
def model():
    """One model for all."""
    return plain.make("qwen2")


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", ["uni_1_0.5", "uni_0_0.5-uni_2_0.25"])
def test_gradients_are_those_of_a_reduced_forward_by_hand(model, spec, side, position):
    same(step(model, batch(side), spec, position=position), by_hand(model, batch(side), spec, position))


@pytest.mark.parametrize("spec", ["uni_1_0.5-attn_3_0.25", "attn_0_0.5-uni_2_0.25"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("preset", [None, "pyramiddrop", "fastv"])
def test_checkpointing_changes_nothing(model, spec, reentrant, preset):
    if preset == "fastv" and "attn_0" in spec:
        spec = "uni_1_0.5-attn_2_0.25"
    drop = vidtok.Drop(spec, preset=preset)
    want = step(model, batch(), drop)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        same(step(model, batch(), drop), want)
    finally:
        model.disable_input_require_grads()


@pytest.mark.skipif(tiny.VERSION >= (5, 23), reason="hooks run once there, outside of checkpoints")
@pytest.mark.parametrize("reentrant", [True, False])
def test_control_a_pass_that_forgets_drops_twice(model, reentrant, monkeypatch):
    """Recomputation that decides anew does not meet the columns of its layer."""
    leave = decoder.DecoderHook._leave

    def forget(self, given, s, *args):
        given.base = given.steps.pop(s, given.base)
        return leave(self, given, s, *args)

    monkeypatch.setattr(decoder.DecoderHook, "_leave", forget)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with pytest.raises((RuntimeError, ValueError)):
            step(model, batch(), "uni_1_0.5")
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        model.eval()


def test_the_query_of_training_is_that_of_inference(model):
    """With labels, the last prompt token asks: the answer that follows does not change what is kept."""
    kept = []
    for more in ([7, 8, 9], [60, 61, 62]):
        ids = torch.tensor([GIVEN[0] + more])
        labels = torch.tensor([[-100] * len(GIVEN[0]) + more])
        with vidtok.attach(model, decoder="attn_1_0.3") as handle, handle.tokens(plain.visual(ids)), torch.no_grad():
            model(input_ids=ids, labels=labels, use_cache=False)
            kept.append(handle.report().samples[0].at(1).anchor)
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="attn_1_0.3") as handle, handle.tokens(plain.visual(ids)), torch.no_grad():
        model(input_ids=ids)
        kept.append(handle.report().samples[0].at(1).anchor)
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_video_models_train_with_both_reductions(models, kind, reentrant):
    """Every parameter of a layer behind a drop has a gradient, the same with checkpointing."""
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    inputs["labels"][:, :-4] = -100
    results = []
    for checkpoint in (False, True):
        if checkpoint and reentrant is None:
            continue
        model.train()
        model.zero_grad()
        if checkpoint:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            with vidtok.attach(model, visual=tiny.merge, decoder="uni_2_0.5"):
                loss = model(**inputs, use_cache=False).loss
                loss.backward()
        finally:
            if checkpoint:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads()
            model.eval()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    grads = results[0][1]
    assert all(n in grads and float(grads[n].abs().max()) > 0 for n, _ in model.named_parameters() if ".layers.2." in n)
    if len(results) == 2:
        torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=2e-6)
        for name in results[1][1]:
            torch.testing.assert_close(results[1][1][name], grads[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()
