"""A tower of the user's own: against loops, and what is said of one that does not fit."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.merge import reference
from tests.merge.own_vit import Every, Own, attend, feed, tokens
from vidtok.merge import Merging, ToMe, attach_any, unmerge, weighted_mean


def put(model, merge="tome:r=4", **options):
    return attach_any(model, merge, **{"blocks": "stages.blocks", "halves": (attend, feed), **options})


def by_loops(model, x, merges, metric="keys", prop_attn=True, protected=1):
    size = torch.ones(x.shape[0])
    for block, r in zip(model.stages["blocks"], merges, strict=True):
        q, k, v = (part[0] for part in block.heads(x[None]))
        out = reference.attention(q, k, v, size if prop_attn else None, q.shape[-1] ** -0.5)
        x = x + block.proj(out.transpose(0, 1).flatten(1))
        compared = {"keys": k.mean(0), "values": v.mean(0), "hidden": x}[metric]
        x, size = reference.merge(x, compared, size, r, protected)
        x = feed(block, x)
    return x, size


@pytest.mark.parametrize(
    "metric, prop_attn, protected",
    [("keys", True, 1), ("values", True, 0), ("hidden", True, 1), ("keys", False, 3), ("hidden", False, 0)],
)
def test_equals_loops(metric, prop_attn, protected):
    model, merges = Own(), [4, 3, 0, 2]
    options = ToMe(r=merges, metric=metric, prop_attn=prop_attn)
    with torch.no_grad(), put(model, options, protected=protected) as merging:
        out = model(tokens())
        for x, got, size in zip(tokens(), out, merging.size, strict=True):
            want, sizes = by_loops(model, x, merges, metric, prop_attn, protected)
            torch.testing.assert_close(size, sizes, rtol=0, atol=0)
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_metrics_differ():
    outs = []
    for metric in ("keys", "values", "hidden"):
        model = Own()
        with torch.no_grad(), put(model, ToMe(r=3, metric=metric)):
            outs.append(model(tokens()))
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2]) and not torch.equal(outs[0], outs[2])


def test_no_merges_change_no_bit():
    model = Own()
    with torch.no_grad():
        want = model(tokens())
        with put(model, "tome:r=0"):
            assert torch.equal(model(tokens()), want)
        assert torch.equal(model(tokens()), want)


class Halves:
    attend = staticmethod(attend)
    feed = staticmethod(feed)


def test_halves_as_an_object():
    model = Own()
    with torch.no_grad():
        with put(model):
            want = model(tokens())
        with put(model, halves=Halves()):
            assert torch.equal(model(tokens()), want)


def test_blocks_as_a_list_or_a_part_of_them():
    model = Own()
    with torch.no_grad():
        with put(model, "tome:r=[4,4,0,0],prop_attn=false"):
            want = model(tokens())
        with put(model, "tome:r=4,prop_attn=false", blocks=model.stages["blocks"][:2]) as merging:
            assert torch.equal(model(tokens()), want)
            assert merging.size.shape == (2, 9)


def test_further_arguments_and_names():
    model = Own(1)
    block = model.stages["blocks"][0]
    with torch.no_grad():
        want = block(tokens(), 0.5)
        with put(model, "tome:r=0"):
            for got in (block(tokens(), 0.5), block(tokens(), shift=0.5), block(tokens=tokens(), shift=0.5)):
                assert torch.equal(got, want)
            assert torch.equal(block.forward(tokens(), 0.5), want)


def test_a_mask_protects():
    model, mask = Own(), torch.zeros(17, dtype=torch.bool)
    mask[[0, 3, 8, 9, 16]] = True
    with torch.no_grad(), put(model, ToMe(r=3, trace=True), protected=mask) as merging:
        model(tokens())
        plan = merging.trace()
        offset = plan.offset.tolist()
        groups = [plan.member[a:b].tolist() for a, b in zip(offset, offset[1:])]
        assert [len(g) for g in groups if any(mask[m % 17] for m in g)] == [1] * 10
        assert merging.size.sum(1).tolist() == [17.0, 17.0]


def test_full_length_gives_every_token_back():
    model = Own()
    with torch.no_grad():
        with put(model, ToMe(r=4, trace=True)) as merging:
            want = merging.unmerge(model(tokens()))
        with put(model, full_length=True) as merging:
            got = model(tokens())
            assert got.shape == (2, 17, 32) and torch.equal(got, want)
            assert merging.size.shape == (2, 3)


def test_a_mean_counts_every_token():
    x, size = torch.randn(2, 3, 4), torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 4.0]])
    rows = [torch.repeat_interleave(a[1:], b[1:].long(), 0).mean(0) for a, b in zip(x, size)]
    torch.testing.assert_close(weighted_mean(x, size, 1), torch.stack(rows))
    assert torch.equal(unmerge(None, x), x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_checkpoints_of_the_users_own(every, reentrant):
    """Two passes before the backward one: each block is computed again with the sizes of its own pass."""
    model = Own()
    inputs = [tokens().requires_grad_(), (3 * tokens(3, 15).flip(1)).requires_grad_()]
    with put(model):
        grads = []
        for forward in (model, Every(model, every, reentrant)):
            model.zero_grad()
            sum(forward(x * 1.0).square().mean() for x in inputs).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_without_the_note_on_the_tokens_checkpoints_fail(monkeypatch):
    monkeypatch.setattr("vidtok.merge.attach.recall", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_checkpoints_of_the_users_own(1, False)


def test_a_pass_in_the_backward_one_keeps_the_last_run():
    model = Own()
    with put(model) as merging:
        y = checkpoint(model, tokens().requires_grad_(), use_reentrant=False)
        run = merging.run
        y.sum().backward()
        assert merging.run is run and merging.size.shape == (2, 3)


def test_gradients_are_those_of_the_loops():
    model, x = Own(), tokens(1).requires_grad_()
    with put(model, "tome:r=3"):
        model(x).square().sum().backward()
    got, x.grad = x.grad, None
    by_loops(model, x[0], [3] * 4)[0].square().sum().backward()
    assert (got - x.grad).norm() <= 1e-4 * x.grad.norm()


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": "blocks"}, "expected Own to have blocks at 'blocks', got no 'blocks' in Own; Own has stages"),
        ({"blocks": "stages.layers"}, "no 'layers' in ModuleDict"),
        ({"blocks": "stages"}, "expected a list of the blocks of Own at 'stages', got ModuleDict"),
        ({"blocks": []}, "expected Own to have blocks in blocks=, got an empty list"),
        ({"blocks": [1, 2]}, "expected modules as the blocks of Own, got int at 0"),
        ({"blocks": [nn.Linear(2, 2)]}, "expected blocks of Own, got at 0 a Linear that is not inside it"),
        ({"halves": object()}, "two functions, (attend, feed), got object without attend and feed"),
        ({"halves": Halves}, "got the class Halves; give an instance"),
        ({"halves": (attend,)}, "expected halves as two functions"),
        ({"halves": (attend, None)}, "expected halves as two functions"),
        ({"protected": -1}, "expected protected as an integer of at least 0 or a bool tensor, got -1"),
        ({"protected": True}, "got True"),
        ({"protected": torch.ones(17)}, "protected as an integer or bool [T] or [B, T], got torch.float32 [17]"),
        ({"merge": "tome:r=4,metric=queries"}, "expected metric as one of keys, values, hidden, got 'queries'"),
        ({"merge": "tome:r=[1,2]"}, "expected r with one number for each of the 4 layers, got 2 numbers"),
        ({"merge": "tome:r=-1"}, "r as an integer of at least 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    model = Own()
    with pytest.raises(ValueError, match=re.escape(message)):
        put(model, **options)
    assert type(model.stages["blocks"][0]).__mro__[1] is nn.Module
    put(model).restore()


def test_a_mask_of_another_length_is_named():
    model = Own()
    with (
        put(model, protected=torch.zeros(9, dtype=torch.bool)),
        pytest.raises(ValueError, match=re.escape("protected of bool [17] or [2, 17], got torch.bool [9]")),
    ):
        model(tokens())


@pytest.mark.parametrize("metric", ["keys", "hidden"])
def test_attention_that_reports_nothing(metric):
    def silent(block, x, step):
        out = nn.functional.scaled_dot_product_attention(*block.heads(x))
        return x + block.proj(out.transpose(1, 2).flatten(2))

    model = Own()
    message = "expected the attention half of Block 0 to call step.attention(q, k, v), got a pass without it"
    with (
        put(model, ToMe(r=4, metric=metric), halves=(silent, feed)),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        model(tokens())
    # Sizes that attention never sees are as silent.
    with (
        put(model, ToMe(r=[0, 0, 4, 0]), halves=(lambda b, x, s: (attend if s.index < 3 else silent)(b, x, s), feed)),
        pytest.raises(ValueError, match="attention half of Block 3"),
    ):
        model(tokens())


@pytest.mark.parametrize("wrong", [lambda b, x, s: None, lambda b, x, s: attend(b, x, s)[:, :-1]])
def test_attention_that_gives_something_else(wrong):
    model = Own()
    with (
        put(model, halves=(wrong, feed)),
        pytest.raises(ValueError, match=re.escape("expected attend of Block 0 to give tokens [2, 17, 32] back")),
    ):
        model(tokens())


def test_blocks_out_of_order():
    model = Own()
    blocks = model.stages["blocks"]
    with torch.no_grad(), put(model):
        with pytest.raises(ValueError, match="expected block 2 of Own to run after block 1, got it first"):
            blocks[2](tokens())
        x = blocks[0](tokens())
        with pytest.raises(ValueError, match="expected block 2 of Own to run after block 1, got it after 0"):
            blocks[2](x)
        x = blocks[1](x)
        with pytest.raises(ValueError, match="expected block 1 of Own to run after block 0, got it after 1"):
            blocks[1](x)
        assert model(tokens()).shape == (2, 3, 32)  # nothing of it stays


def test_a_block_in_two_places():
    model = Own()
    blocks = model.stages["blocks"]
    blocks[3] = blocks[1]
    with pytest.raises(ValueError, match="expected every block of Own once, got the Block at 3 a second time"):
        put(model)


def test_a_block_without_tokens():
    model = Own()
    with put(model):
        with pytest.raises(ValueError, match="a block of Own to be called with its tokens first"):
            model.stages["blocks"][0]()
        with pytest.raises(
            ValueError, match=re.escape("blocks of Own to get tokens [B, T, C], got torch.float32 [17, 32]")
        ):
            model(tokens()[0])


def test_a_second_attachment_is_refused():
    model = Own()
    with put(model) as merging:
        assert isinstance(merging, Merging)
        with pytest.raises(ValueError, match="expected a Own without token merging"):
            put(model)
        assert type(copy.deepcopy(model).stages["blocks"][0]).__mro__[1] is nn.Module
