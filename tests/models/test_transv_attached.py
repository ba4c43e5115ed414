"""TransV inside attached models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from vidtok.models import attach
from vidtok.models.drop import Drop
from vidtok.models.transv import TransV

KIND = "qwen2_5_vl"
SPEC = "uni_1_0.6-attn_2_0.3"


@pytest.fixture(scope="module")
def model():
    return tiny.make(KIND, layers=4)


def trained(model: Any, **options: Any) -> Drop:
    """Stages whose gates are open, with the weights of the layers' attention."""
    transv = TransV(model.model.language_model, SPEC, init="attention", **options)
    with torch.no_grad():
        for stage in transv.stages:
            stage.alpha.fill_(0.5)
    return Drop(SPEC, merge=transv)


def forward(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, use_cache=False, **more)


def test_untrained_it_changes_nothing(model):
    inputs = tiny.batch(KIND, tiny.ROWS)
    with attach(model, decoder=SPEC) as handle:
        plain = tiny.generate(model, inputs)[0]
        assert handle.transv is None
    with attach(model, decoder=Drop(SPEC, merge="transv")) as handle:
        assert torch.equal(plain, tiny.generate(model, inputs)[0])
        assert len(handle.transv.stages) == 2 and all(p.requires_grad for p in handle.transv.parameters())
        assert not any("alpha" in name for name in model.state_dict())
        assert not any(m is handle.transv for m in model.modules())
    with attach(model, decoder=trained(model)):
        assert (plain - tiny.generate(model, inputs)[0]).abs().max() > 1e-2


def test_rows_of_a_batch_get_what_they_get_alone(model):
    drop = trained(model)
    for side in ("left", "right"):
        inputs = tiny.batch(KIND, tiny.ROWS, side=side)
        with attach(model, decoder=drop, visual="uniform:ratio=0.75"):
            if side == "left":
                got = tiny.generate(model, inputs)[0]
            else:
                got = forward(model, inputs).logits[:, -1:]
            for i in range(3):
                row = tiny.row(inputs, tiny.ROWS, i)
                want = tiny.generate(model, row)[0] if side == "left" else forward(model, row).logits[:, -1:]
                torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def labelled(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One row with labels on its last tokens, and the prompt before them."""
    inputs = tiny.row(tiny.batch(KIND, tiny.ROWS), tiny.ROWS, 1)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -count:] = inputs["input_ids"][:, -count:]
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    prompt = {k: v[:, :-count] if k in per_token else v for k, v in inputs.items()}
    return {**inputs, "labels": labels}, prompt


@pytest.mark.parametrize("answers", [False, True])
def test_training_equals_inference_unless_answers_read_too(model, answers):
    count = 4
    inputs, prompt = labelled(count)
    with attach(model, decoder=trained(model, answers=answers)), torch.no_grad():
        whole = forward(model, inputs).logits[0, -count - 1 :]
        out = model(**prompt, use_cache=True)
        cache, logits = out.past_key_values, [out.logits[0, -1]]
        start = prompt["input_ids"].shape[1]
        for i in range(count):
            step = model.prepare_inputs_for_generation(
                inputs["input_ids"][:, : start + i + 1], past_key_values=cache, use_cache=True,
                attention_mask=torch.ones(1, start + i + 1, dtype=torch.long),
                cache_position=torch.arange(start + i, start + i + 1), is_first_iteration=False,
            ) if tiny.VERSION[0] == 4 else {
                "input_ids": inputs["input_ids"][:, start + i : start + i + 1], "past_key_values": cache,
            }  # fmt: skip
            logits.append(model(**step).logits[0, -1])
    got = torch.stack(logits)
    torch.testing.assert_close(got[0], whole[0], rtol=1e-4, atol=1e-3)
    far = (got[1:] - whole[1:]).abs().max()
    assert far > 1e-2 if answers else far < 2e-3


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gates_learn_inside_the_model(model, reentrant):
    inputs, _ = labelled(4)
    want = None
    for checkpointing in (False, reentrant is not None):
        transv = TransV(model.model.language_model, SPEC, init="attention")
        with torch.no_grad():
            for stage in transv.stages:
                stage.alpha.fill_(0.3)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        try:
            with attach(model, decoder=Drop(SPEC, merge=transv)):
                model.zero_grad()
                loss = model(**inputs, use_cache=False).loss
                loss.backward()
        finally:
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.disable_input_require_grads()
            model.eval()
            model.zero_grad()
        grads = [p.grad.clone() for n, p in transv.named_parameters() if "k_proj.bias" not in n]
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
        if want is not None:
            for g, w in zip(grads, want):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
        want = grads
