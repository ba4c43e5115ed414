"""What a checkpoint computes again merges as it did before: with attention of one kind, whatever trains.

In bf16 with many merges: there other bits of attention are other merges.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.merge.own_vit import Every, Own, attend, feed, tokens
from vidtok.kernels import select
from vidtok.merge import attach_any, attention
from vidtok.merge.run import Step


def put(model: nn.Module):
    return attach_any(model, "tome:r=24", blocks="stages.blocks", halves=(attend, feed), protected=1)


def own() -> Own:
    return Own().bfloat16().train()


def input_() -> Tensor:
    return tokens(4, 197).bfloat16()


def results(model: nn.Module, call) -> list[Tensor]:
    """What a pass gives, and its gradients."""
    model.zero_grad()
    y = call()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return [y.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(model: nn.Module, plain, again) -> None:
    one, two = results(model, plain), results(model, again)
    assert len(one) == len(two) > 1
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("trained", [".mlp.", "blocks.2."])
def test_a_part_that_trains(every, trained):
    model, x = own(), input_()
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    with put(model):
        again = Every(model, every, False)
        same(model, lambda: model(x), lambda: again(x))


class Embedded(nn.Module):
    """Tokens whose embedding is inside the checkpoint."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.core = nn.Linear(32, 32).bfloat16(), core

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.embed(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_over_the_embedding_too(reentrant):
    model, x = own(), input_().requires_grad_()
    whole = Embedded(model)
    with put(model):
        same(whole, lambda: whole(x), lambda: checkpoint(whole, x, use_reentrant=reentrant))


def test_a_dummy_that_requires_a_gradient():
    model, x, dummy = own(), input_(), torch.zeros(1, requires_grad=True)
    blocks = list(model.stages["blocks"])

    def part(start):
        return lambda x, _: blocks[start + 1](blocks[start](x))

    def again():
        return checkpoint(part(2), checkpoint(part(0), x, dummy, use_reentrant=True), dummy, use_reentrant=True)

    with put(model):
        same(model, lambda: model(x), again)


def test_a_pass_without_gradients_in_training():
    """As caches of gradients take it: its outputs are those of the pass that follows."""
    model, x = own(), input_()
    with put(model):
        with torch.no_grad():
            first = model(x)
        assert torch.equal(first, model(x))


@pytest.mark.skipif(not select.holds("proportional_attention"), reason="needs the compiled extension")
def test_attention_of_either_kind_merges_otherwise(monkeypatch):
    """What the other tests would miss: this one fails them."""
    monkeypatch.setattr(attention, "_vectors", lambda: True)
    monkeypatch.setattr(attention, "_amx", lambda: False)
    monkeypatch.setattr(Step, "free", property(lambda step: step._works))
    for test in (
        test_a_dummy_that_requires_a_gradient,
        lambda: test_a_checkpoint_over_the_embedding_too(True),
        test_a_pass_without_gradients_in_training,
    ):
        with pytest.raises(AssertionError):
            test()
