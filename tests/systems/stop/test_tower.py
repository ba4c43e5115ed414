"""STOP's tower against the published form and against loops."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baselines import stop as published
from tests.systems.stop.reference import clips, make, tower
from vidtok.systems.stop import tower as ours


def close(got, want, rel=1e-5):
    assert torch.isfinite(got).all() and (got - want).norm() <= rel * want.norm()


@pytest.mark.parametrize(
    ("prompt", "frames", "lora"), [("DGL", 1, True), ("DGL", 5, False), ("group2-2", 3, True), ("group2-2", 1, False)]
)
def test_equals_the_published_form(prompt, frames, lora):
    model = make(prompt, lora=lora)
    video = clips(frames=frames)
    with torch.no_grad():
        close(model.stop(model.clip.visual, video)[0], published.tower(model, video))


@pytest.mark.parametrize(
    ("prompt", "prop_attn", "form"),
    [("DGL", True, "mask"), ("DGL", False, "mask"), ("group2-2", True, "channel")],
)
def test_equals_loops(prompt, prop_attn, form):
    model = make(prompt, layers=4)
    model.set_tome([5, 3, 2, 2], prop_attn=prop_attn)
    object.__setattr__(model.tome, "form", form)
    video = clips()
    with torch.no_grad():
        out, run = model.stop(model.clip.visual, video, model.tome)
    for i, one in enumerate(video):
        want, size = tower(model, one, [5, 3, 2, 0], prop_attn)
        close(out[i], want)
        torch.testing.assert_close(run.size[3].view(2, 3, -1)[i], torch.stack(size), rtol=0, atol=0)


@pytest.mark.parametrize(("frames", "prop_attn"), [(4, True), (5, True), (5, False), (1, True)])
def test_joined_frames_equal_loops(frames, prop_attn):
    model = make(
        layers=4, tome_r=3, tome_frame_merging=True, tome_merge_layers="1-3", tome_merge_frame_nums="2-2",
        tome_prop_attn=prop_attn, max_frames=frames,
    )  # fmt: skip
    video = clips(2, frames)
    levels = model.tome.levels(4, frames, 17, 1)
    merges, joins = [level.intra for level in levels], {i: (2, levels[i].cross) for i in (1, 3)}
    with torch.no_grad():
        out = model.stop(model.clip.visual, video, model.tome)[0]
    for one, got in zip(video, out):
        close(got, tower(model, one, merges, prop_attn, joins)[0])


def test_loops_without_merging_are_the_published_form():
    model, video = make("group2-2", layers=2), clips()
    with torch.no_grad():
        want = published.tower(model, video)
        close(torch.stack([tower(model, one, [0, 0])[0] for one in video]), want)


@given(frames=st.integers(1, 7), batch=st.integers(1, 3), r=st.integers(0, 20), prompts=st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_any_frames_and_any_r(frames, batch, r, prompts):
    model = make(layers=3, frame_prompts=prompts, global_prompts=7 - prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_tome([r, max(0, r - 7), r])
    video = clips(batch, frames)
    with torch.no_grad():
        out, run = model.stop(model.clip.visual, video, model.tome)
        if run is None:
            close(out, published.tower(model, video))
    assert torch.isfinite(out).all()
    if run is not None:
        # Every frame keeps the same count, and nothing is lost.
        assert run.size[2].shape == (batch * frames, run.tokens[2])
        assert (run.size[2].sum(1) == 17).all() and (run.size[2][:, 0] == 1).all()


def test_zero_r_is_the_plain_model():
    model, video = make(), clips()
    with torch.no_grad():
        plain = model.encode_video(video)
        model.set_tome([0, 0, 1])  # the last layer merges nothing
        assert torch.equal(model.encode_video(video), plain)


def broken_count(batch, frames):
    """What ``attend_video`` would be if the video's prompts counted once per frame."""

    def attend_video(self, attn, query, keys, size, step):
        (q,) = attn.split(query)
        k, v = attn.split(keys.view(batch, -1, keys.shape[-1]))
        return attn.join(self.sized(q, k, v, None if size is None else size.view(batch, -1), step))

    return attend_video


def test_prompts_of_the_video_count_once(monkeypatch):
    model, video = make(), clips()
    with torch.no_grad():
        want = published.tower(model, video)
        monkeypatch.setattr(ours.Stop, "attend_video", broken_count(2, 3))
        got = model.stop(model.clip.visual, video, None)[0]
    assert (got - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("part", ["frame", "video"])
def test_sizes_weigh_in_both_attentions(part, monkeypatch):
    model = make(layers=4)
    model.set_tome([6, 3, 2, 0])
    video, real = clips(1), ours.Stop.sized

    def without(self, q, k, v, size, step):
        of_video = q.shape[2] == model.config.global_prompts or q.shape[2] == 1
        if size is not None and of_video == (part == "video"):
            size = None if part == "frame" else torch.where(size < 1, size, torch.ones_like(size))
        return real(self, q, k, v, size, step)

    want = tower(model, video[0], [6, 3, 2, 0])[0]
    with torch.no_grad():
        close(model.stop(model.clip.visual, video, model.tome)[0][0], want)
        monkeypatch.setattr(ours.Stop, "sized", without)
        got = model.stop(model.clip.visual, video, model.tome)[0][0]
    assert (got - want).norm() > 1e-3 * want.norm()


def test_gradients_flow_through_merging():
    torch.manual_seed(0)
    model = make("group2-2", layers=2, adapter_width=8).double()
    model.set_tome(5)
    video = clips(1, 3).double().requires_grad_()
    weight = torch.randn(32, dtype=torch.float64)

    def loss(prompt):
        with torch.no_grad():
            model.stop.prompts.frame[0].copy_(prompt)
        return model.stop(model.clip.visual, video, model.tome)[0] @ weight

    loss(model.stop.prompts.frame[0].clone()).sum().backward()
    names = {n for n, p in model.stop.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not names
    grad, start = model.stop.prompts.frame.grad[0].clone(), model.stop.prompts.frame[0].detach().clone()
    direction = torch.randn_like(start)
    with torch.no_grad():
        up, down = loss(start + 1e-6 * direction), loss(start - 1e-6 * direction)
    torch.testing.assert_close((up - down) / 2e-6, (grad * direction).sum().view(1), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("prompt", ["none", "DGL"])
def test_recomputed_layers_have_the_same_gradients(prompt):
    grads = []
    for again in (False, True):
        model = make(prompt, tome_r=4, gradient_checkpointing=again).train()
        loss = model.encode_video(clips()) @ torch.linspace(-1, 1, 32)
        loss.sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_recomputed_layers_keep_less():
    def saved(again):
        model = make(layers=4, tome_r=2, gradient_checkpointing=again).train()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            model.encode_video(clips())
        return sum(held)

    assert saved(True) < 0.5 * saved(False)
