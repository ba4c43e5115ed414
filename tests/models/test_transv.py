"""TransV: dropped tokens passed to the text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from tests.models.texts import plain, ragged
from vidtok.models.drop import Drop
from vidtok.models.transv import TransV


def formula(module, text: Tensor, dropped: Tensor) -> Tensor:
    """One row, written from the formula in fp64."""
    heads, kv, dim = module.heads, module.kv_heads, module.dim

    def project(layer, x: Tensor, count: int) -> Tensor:
        out = x.double() @ layer.weight.double().T
        out = out if layer.bias is None else out + layer.bias.double()
        return out.view(-1, count, dim).transpose(0, 1)

    q, k, v = (
        project(module.q_proj, text, heads), project(module.k_proj, dropped, kv), project(module.v_proj, dropped, kv)
    )  # fmt: skip
    k, v = (torch.stack([x[h * kv // heads] for h in range(heads)]) for x in (k, v))
    out = (q @ k.transpose(1, 2) / math.sqrt(dim)).softmax(-1) @ v
    out = out.transpose(0, 1).reshape(len(text), -1) @ module.o_proj.weight.double().T
    return text.double() + math.tanh(module.alpha.item()) * out


@pytest.fixture(scope="module")
def model():
    return plain("Qwen2", layers=3)


def case() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, what leaves, and the text, of three ragged rows of which the last has no video."""
    _, tokens, _ = ragged()
    hidden = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(1))
    dropped = (tokens.unit >= 0) & (torch.arange(40) % 3 > 0)
    return hidden, dropped, TransV.text(_Reader(), tokens)


class _Reader:
    answers = False


def test_text_reads_what_leaves_by_the_formula_row_by_row(model):
    transv = TransV(model, "uni_0_0.5-uni_2_0.2")
    hidden, dropped, text = case()
    with torch.no_grad():
        transv.stages[1].alpha.fill_(0.7)
        out = transv(1, hidden, dropped, text)
    assert torch.equal(out[~text], hidden[~text])
    for i in range(2):
        want = formula(transv.stages[1], hidden[i, text[i]], hidden[i, dropped[i]])
        torch.testing.assert_close(out[i, text[i]].double(), want, rtol=1e-5, atol=1e-5)
        assert (out[i, text[i]] - hidden[i, text[i]]).abs().max() > 1e-2
    assert torch.equal(out[2], hidden[2]), "nothing leaves a row of text"
    with torch.no_grad():
        alone = transv(1, hidden[:1, 8:], dropped[:1, 8:], text[:1, 8:])
    torch.testing.assert_close(alone, out[:1, 8:], rtol=1e-5, atol=1e-5)


def test_nothing_changes_at_first_and_alpha_learns(model):
    transv = TransV(model, "uni_1_0.5")
    hidden, dropped, text = case()
    hidden.requires_grad_()
    out = transv(0, hidden, dropped, text)
    assert torch.equal(out, hidden)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert transv.stages[0].alpha.grad.abs() > 1e-3
    assert torch.isfinite(hidden.grad).all()
    with torch.no_grad():
        transv.stages[0].alpha.fill_(0.5)
    hidden.grad = None
    transv(0, hidden, dropped, text)[text].sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in transv.named_parameters() if "k_proj.bias" not in n)
    assert (hidden.grad[dropped].abs().amax(-1) > 0).all(), "gradients reach what was dropped"
    assert torch.equal(hidden.grad[~dropped & ~text], torch.zeros_like(hidden)[~dropped & ~text])


def test_sizes_and_weights_are_those_of_the_layer(model):
    made = TransV(model, "uni_1_0.5", init="attention").stages[0]
    theirs = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(made, name).weight, getattr(theirs, name).weight)
        assert getattr(made, name).weight.data_ptr() != getattr(theirs, name).weight.data_ptr()
    assert torch.equal(made.k_proj.bias, theirs.k_proj.bias)
    assert not any("alpha" in name for name in model.state_dict())
    assert made.alpha == 0
    with pytest.raises(ValueError, match="expected init to be None or 'attention', got 'random'"):
        TransV(model, "uni_1_0.5", init="random")
    with pytest.raises(ValueError, match="a layer from 0 to 2 of the model's 3, got 9"):
        TransV(model, "uni_9_0.5")


def test_a_stage_before_a_layer_without_attention_takes_the_next_one():
    if tiny.VERSION < (5, 17):
        return
    hybrid = plain("NemotronH")
    made = TransV(hybrid, "uni_0_0.5", init="attention").stages[0]
    assert torch.equal(made.q_proj.weight, hybrid.model.layers[1].mixer.q_proj.weight)
    with pytest.raises(ValueError, match="expected an attention layer among the 20 from layer 2 on, got none"):
        TransV(hybrid, "uni_2_0.5")


def test_which_text_reads(model):
    _, tokens, labels = ragged()
    text = TransV(model, "uni_1_0.5").text(tokens, labels)
    assert text[0].nonzero().squeeze(1).tolist() == [30, 31, 32, 33, 34], "behind the last visual token, no answers"
    assert text[1].nonzero().squeeze(1).tolist() == list(range(26, 35))
    assert not text[2].any()
    assert TransV(model, "uni_1_0.5", answers=True).text(tokens, labels)[0].nonzero().squeeze(1).tolist() == list(
        range(30, 40)
    )
    assert Drop("uni_1_0.5", merge="transv").merge == "transv"
