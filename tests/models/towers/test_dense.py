"""Every dense tower of transformers with merging tokens against loops."""

from __future__ import annotations

import copy

import pytest
import torch

import vidtok
from tests.models import flash
from tests.models.towers import dense
from tests.models.towers.dense import KINDS, MERGES, NAMES, by_loops, close, inputs, make, of
from vidtok.merge import ToMe
from vidtok.models.towers import _masks, dinov3


def run(model, kind, options, **more):
    with torch.no_grad(), vidtok.attach(model, vision=options) as handle:
        out = model(**inputs(kind), **more)
    return out, handle.vision[0]


def agrees(model, kind, out, merging, **options):
    """Whether every image is as loops have it."""
    prefix = KINDS[kind].prefix
    same = []
    with torch.no_grad():
        for i in range(2):
            want = by_loops(model, of(i, inputs(kind)), MERGES, prefix, **options)
            same.append(torch.equal(merging.size[i], want.size) and close(out.last_hidden_state[i], want.x))
    return all(same)


FORMS = [("sdpa", "mask"), ("sdpa", "channel"), ("eager", "mask")]


@pytest.mark.parametrize(("implementation", "form"), FORMS)
@pytest.mark.parametrize("kind", NAMES)
def test_equals_loops(kind, implementation, form):
    model = make(kind, implementation)
    out, merging = run(model, kind, ToMe(r=MERGES, form=form))
    assert agrees(model, kind, out, merging)
    tokens = merging.run.tokens[0]
    assert torch.equal(merging.size.sum(1), torch.full((2,), float(tokens)))
    assert out.last_hidden_state.shape[1] == tokens - sum(MERGES)


@pytest.mark.parametrize("kind", NAMES)
def test_sizes_matter_to_attention(kind):
    model = make(kind)
    out, merging = run(model, kind, ToMe(r=MERGES, prop_attn=False))
    assert agrees(model, kind, out, merging, prop_attn=False)
    out, merging = run(model, kind, ToMe(r=MERGES))
    assert not agrees(model, kind, out, merging, prop_attn=False)


@pytest.mark.parametrize("metric", ["values", "hidden"])
@pytest.mark.parametrize("kind", ["siglip", "dinov3_vit", "vit"])
def test_metrics(kind, metric):
    model = make(kind)
    out, merging = run(model, kind, ToMe(r=MERGES, metric=metric))
    assert agrees(model, kind, out, merging, metric=metric)
    assert not agrees(model, kind, out, merging)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NAMES)
def test_no_merges_change_no_bit(kind, implementation):
    model = make(kind, implementation)
    with torch.no_grad():
        want = model(**inputs(kind))
        got, _ = run(model, kind, "tome:r=0")
        run(model, kind, "tome:r=4")
        after = model(**inputs(kind))
    for other in (got, after):
        for name, value in want.items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", NAMES)
def test_recorded_states_and_weights(kind, implementation):
    model = make(kind, implementation)
    eager = implementation == "eager"
    more = {"output_attentions": True} if eager else {}
    out, merging = run(model, kind, ToMe(r=MERGES), output_hidden_states=True, **more)
    assert agrees(model, kind, out, merging)
    assert [x.shape[1] for x in out.hidden_states] == merging.run.tokens
    with torch.no_grad():
        want = by_loops(model, of(0, inputs(kind)), MERGES, KINDS[kind].prefix).states
        # The unreduced model records what it records, before and after.
        plain = model(**inputs(kind), output_hidden_states=True, **more)
    assert all(close(got[0], state) for got, state in zip(out.hidden_states[:-1], want, strict=False))
    assert len({x.shape[1] for x in plain.hidden_states}) == 1
    if eager and plain.attentions:
        assert [w.shape[-1] for w in out.attentions] == merging.run.tokens[:-1]
    again, merging = run(model, kind, ToMe(r=MERGES))
    assert agrees(model, kind, again, merging)


# The head of SigLIP2 keeps it from flash attention from transformers 5 on.
@pytest.mark.parametrize("kind", [name for name in NAMES if not (dense.NEW and name == "siglip2")])
def test_flash(kind):
    with flash.installed() as calls:
        model = make(kind, "flash_attention_2")
        out, merging = run(model, kind, ToMe(r=MERGES))
        assert agrees(model, kind, out, merging)
        assert len(calls) == len(MERGES)


@pytest.mark.parametrize("kind", ["clip", "vit", "videomae"])
def test_another_attention_while_attached(kind):
    model = make(kind, "eager")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            out = model(**inputs(kind))
            assert agrees(model, kind, out, handle.vision[0])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", NAMES)
def test_trace_and_unmerge(kind):
    model = make(kind)
    out, merging = run(model, kind, ToMe(r=MERGES, trace=True))
    plan, full = merging.trace(), merging.unmerge(out.last_hidden_state)
    tokens = merging.run.tokens[0]
    assert plan.num_in == 2 * tokens and full.shape[1] == tokens
    counts = plan.offset.diff().view(2, -1)
    assert torch.equal(counts.float(), merging.size)
    with torch.no_grad():
        want = by_loops(model, of(0, inputs(kind)), MERGES, KINDS[kind].prefix)
    assert plan.anchor.view(2, -1)[0].tolist() == want.place


# ---------------------------------------------------------------------- what stays
@pytest.mark.parametrize("kind", ["siglip", "dinov2_with_registers", "dinov3_vit"])
def test_protected_tokens(kind):
    model, prefix = make(kind), KINDS[kind].prefix
    tokens = 36 + prefix
    for protected, held in (
        (3, lambda row: set(range(prefix, prefix + 3))),
        (torch.arange(tokens).ge(tokens - 9), lambda row: set(range(tokens - 9, tokens))),
        (torch.arange(tokens).remainder(5).eq(torch.tensor([[2], [3]])), lambda row: set(range(2 + row, tokens, 5))),
    ):
        out, merging = run(model, kind, ToMe(r=4, protected=protected))
        for row in range(2):
            places = held(row)
            with torch.no_grad():
                want = by_loops(
                    model, of(row, inputs(kind)), [4, 4, 4], prefix,
                    held=lambda now, places=places: {t for t, was in enumerate(now) if was in places},
                )  # fmt: skip
            assert close(out.last_hidden_state[row], want.x)
            assert places <= set(want.place)
            assert all(size == 1 for was, size in zip(want.place, merging.size[row], strict=True) if was in places)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"ratio": 0.5}, 18), ({"k": 20}, 20), ({"r": [1, 0, 7]}, 28), ({"r": (4, -1)}, 24), ({"r": (4, 1)}, 24),
        ({"r": 30}, 5),
    ],
)  # fmt: skip
def test_schedules(options, left):
    out, _ = run(make("siglip"), "siglip", ToMe(**options))
    assert out.last_hidden_state.shape[1] == left


def test_the_first_token_of_a_video_that_speaks_for_it_stays():
    model = make("videomae", use_mean_pooling=False)
    out, merging = run(model, "videomae", ToMe(r=4))
    with torch.no_grad():
        want = by_loops(model, of(0, inputs("videomae")), [4, 4, 4], 1)
    assert close(out.last_hidden_state[0], want.x) and want.place[0] == 0 and merging.size[0, 0] == 1


# ---------------------------------------------------------------------- rotation
def test_a_merged_token_is_rotated_as_its_destination(monkeypatch):
    model = make("dinov3_vit")
    out, merging = run(model, "dinov3_vit", ToMe(r=MERGES))
    assert agrees(model, "dinov3_vit", out, merging)
    attend = dinov3.Rotated.attend

    def misplaced(self, block, x, step, *args, **kwargs):
        place = step.run.place[step.index]
        if place is not None:
            step.run.place[step.index] = torch.arange(place.shape[1]).expand_as(place)
        return attend(self, block, x, step, *args, **kwargs)

    monkeypatch.setattr(dinov3.Rotated, "attend", misplaced)
    out, merging = run(model, "dinov3_vit", ToMe(r=MERGES))
    assert not agrees(model, "dinov3_vit", out, merging)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("kind", NAMES)
def test_gradients_equal_loops(kind):
    model = make(kind)
    given = inputs(kind)
    seen = []
    for merging in (True, False):
        model.zero_grad()
        if merging:
            with vidtok.attach(model, vision=ToMe(r=MERGES)):
                out = model(**given).last_hidden_state
        else:
            out = torch.stack([by_loops(model, of(i, given), MERGES, KINDS[kind].prefix).x for i in range(2)])
        out.square().mean().backward()
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    own, want = seen
    assert set(own) == set(want) and len(want) > 20
    largest = max(g.norm() for g in want.values())
    for name, grad in want.items():
        assert (own[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("kind", NAMES)
def test_checkpointing_changes_no_gradient(kind):
    model = make(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    with vidtok.attach(model, vision=ToMe(r=MERGES)):
        for _ in range(2):
            torch.manual_seed(0)
            model.zero_grad()
            model(**inputs(kind)).last_hidden_state.square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.gradient_checkpointing_disable()
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_copies_are_plain_after_states_were_recorded():
    model = make("siglip")
    with torch.no_grad():
        want = model(**inputs("siglip"))
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            model(**inputs("siglip"), output_hidden_states=True)
            twin = copy.deepcopy(model)
        for other in (twin, model):
            got = other(**inputs("siglip"))
            assert torch.equal(got.last_hidden_state, want.last_hidden_state)
            assert torch.equal(got.pooler_output, want.pooler_output)


# ---------------------------------------------------------------------- padding
def padded():
    given = inputs("siglip2")
    given["spatial_shapes"] = torch.tensor([[6, 6], [4, 5]])
    given["pixel_attention_mask"][1, 20:] = 0
    return given


@pytest.mark.parametrize("implementation", ["sdpa", "eager", *([] if dense.NEW else ["flash_attention_2"])])
def test_padding_stays_alone_and_masked(implementation):
    with flash.installed():
        model = make("siglip2", implementation)
        given = padded()
        with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=3)) as handle:
            out = model(**given)
            noisy = {**given, "pixel_values": given["pixel_values"].clone()}
            noisy["pixel_values"][1, 20:] = 7.0
            other = model(**noisy)
            merging = handle.vision[0]
    merges = [3, 3, 3]
    with torch.no_grad():
        for i, real in enumerate((36, 20)):
            want = by_loops(model, of(i, given), merges, 0, hidden=lambda place, real=real: place >= real)
            seen = [t for t, was in enumerate(want.place) if was < real]
            assert torch.equal(merging.size[i], want.size)
            assert close(out.last_hidden_state[i, seen], want.x[seen])
            assert close(other.last_hidden_state[i, seen], want.x[seen])
            assert want.size[seen].sum() == real and len(seen) == real - 9
            pooled = dense.by_query(dense.core(model).head, want.x[seen], want.size[seen])
            assert close(out.pooler_output[i], pooled)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", dense.masked())
def test_a_mask_of_the_callers(kind, implementation):
    model, prefix = make(kind, implementation), KINDS[kind].prefix
    mask = torch.ones(2, 36 + prefix, dtype=torch.int64)
    mask[1, prefix + 20 :] = 0
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=3)):
        out = model(**inputs(kind), attention_mask=mask).last_hidden_state
        for i, real in enumerate((prefix + 36, prefix + 20)):
            want = by_loops(
                model, of(i, inputs(kind)), [3, 3, 3], prefix, hidden=lambda place, real=real: place >= real
            )
            seen = [t for t, was in enumerate(want.place) if was < real]
            assert close(out[i, seen], want.x[seen])


# Masks of heads are gone from transformers 5 on.
@pytest.mark.parametrize("kind", [] if dense.NEW else ["vit", "dinov2", "videomae"])
def test_a_mask_of_heads(kind):
    model, heads = make(kind, "eager"), torch.ones(3, 4)
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
        want = model(**inputs(kind)).last_hidden_state
        assert torch.equal(model(**inputs(kind), head_mask=heads).last_hidden_state, want)
        heads[1, 2] = 0
        out = model(**inputs(kind), head_mask=heads)
        assert not close(out.last_hidden_state, want, 1e-3)
        assert handle.vision[0].run.tokens[-1] == out.last_hidden_state.shape[1]


@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
@pytest.mark.parametrize("kind", ["siglip2", "dinov3_vit", "videomae"])
def test_half_precision(kind, dtype, form):
    model, given = make(kind), inputs(kind)
    if dtype != "autocast":
        model = model.to(dtype)
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    with (
        torch.no_grad(),
        vidtok.attach(model, vision=ToMe(r=MERGES, form=form)) as handle,
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"),
    ):
        out = model(**given)
        size = handle.vision[0].size
    assert out.last_hidden_state.isfinite().all() and out.last_hidden_state.shape[1] == size.shape[1]
    assert size.dtype == torch.float32 and size.sum(1).eq(handle.vision[0].run.tokens[0]).all()


def test_masks_of_pairs_are_refused():
    mask = torch.zeros(1, 1, 6, 6)
    assert _masks.real(torch.zeros(2, 6, 4), mask).all()
    mask[0, 0, 0, 3] = float("-inf")
    with pytest.raises(ValueError, match="single pairs"):
        _masks.real(torch.zeros(2, 6, 4), mask)
