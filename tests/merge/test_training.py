"""Training with merging tokens: gradients, checkpoints, autocast, what stays in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CLIPVisionConfig, CLIPVisionModel

import vidtok
from tests.merge import reference
from tests.merge.own_vit import Every, Own, attend, feed, tokens
from tests.merge.tempme_models import SMALL, clip, options, pixels, put, tower
from tests.merge.videos import Clips, Mine, by_loops
from vidtok.merge import ToMe, attach_any

SPECS = ["tome:r=3", SMALL]


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def near(got, want, share: float = 1e-4) -> bool:
    # The gradient of the keys' bias is nought but for rounding.
    scale = max(float(b.norm()) for b in want)
    return len(got) == len(want) and all(
        (a - b).norm() <= share * max(float(b.norm()), 1e-3 * scale) for a, b in zip(got, want, strict=True)
    )


def same(got, want) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------ gradients
def clip_by_loops(model, images, merges):
    own, parts, out = tower(model), Clips(4), []
    for x in own.pre_layrnorm(own.embeddings(images)):
        size = torch.ones(x.shape[0])
        for layer, r in zip(own.encoder.layers, merges, strict=True):
            q, k, v = parts.heads(layer, x)
            x = parts.close(layer, x, reference.attention(q, k, v, size, q.shape[-1] ** -0.5))
            x, size = reference.merge(x, k.detach().mean(0), size, r, 1)
            x = parts.feed(layer, x)
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("form", ["mask", "channel"])
def test_gradients_of_clip_are_those_of_loops(form):
    model, merges = clip(), [3, 3, 0, 2]
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with vidtok.attach(model, vision=ToMe(r=merges, form=form)):
        got = gradients(model, (model(pixels(2)).last_hidden_state @ weight).square().mean())
    want = gradients(model, (clip_by_loops(model, pixels(2), merges) @ weight).square().mean())
    assert near(got, want)


def test_gradients_across_frames_are_those_of_loops():
    model, own = clip(), options(output="video")
    weight = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with vidtok.attach(model, vision=own) as handle, handle.vision[0].frames(5):
        got = gradients(model, (model(pixels(5)).last_hidden_state @ weight).square().mean())
    x = tower(model).pre_layrnorm(tower(model).embeddings(pixels(5)))
    clips = by_loops(tower(model).encoder.layers, Clips(4), x, own)
    want = gradients(model, (torch.stack([c.x for c in clips]) @ weight).square().mean())
    assert near(got, want)


def test_nothing_flows_through_decisions():
    """Keys reach the loss by attention alone: without it the projection of the keys has no gradient."""

    def no_attention(block, x, step):
        _, k, v = block.heads(x)
        step.note(k, v)
        return x + block.proj(v.transpose(1, 2).flatten(2))

    model = Own()
    with attach_any(model, "tome:r=3,prop_attn=false", blocks="stages.blocks", halves=(no_attention, feed)):
        model(tokens()).square().mean().backward()
    own = model.stages["blocks"][0].qkv.weight.grad
    assert not own[32:64].any() and own[64:].abs().sum() > 0


# ------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_checkpoints_of_transformers(spec, reentrant):
    """Two passes of different batch sizes before the backward one."""
    model = clip().train()
    grads = []
    with vidtok.attach(model, vision=spec):
        for on in (True, False):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_disable()
            outs = [model(pixels(n).requires_grad_()).pooler_output for n in (4, 8)]
            grads.append(gradients(model, sum(out.square().mean() for out in outs)))
    assert same(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_checkpoints_across_frames(every, reentrant, order):
    model, grads = Own(), []
    counts = [(4,), (3, 5)]
    noise = torch.randn(8, 17, 32, generator=torch.Generator().manual_seed(4))
    with put(model, options(trace=True)) as merging:
        for forward in (model, Every(model, every, reentrant)):
            model.zero_grad()
            losses = []
            for frames in counts:
                with merging.frames(list(frames)):
                    losses.append(forward(noise[: sum(frames)].clone().requires_grad_()).square().mean())
            for i in order:
                losses[i].backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    assert near(grads[1], grads[0], 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_parts_of_one_batch_are_passes_of_their_own(reentrant):
    model, batch = Own(), tokens(4).requires_grad_()
    parts = [batch[:1], batch[1:]]
    grads = []
    with put(model, ToMe(r=3)):
        for forward in (model, Every(model, 1, reentrant)):
            grads.append(gradients(model, sum(forward(part).square().mean() for part in parts)))
    assert near(grads[1], grads[0], 1e-6)


# ------------------------------------------------------------------ modes, autocast
def soft():
    model = clip()
    for p in model.parameters():
        p.data /= 2.5 if p.dim() > 1 else 1
    return model


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(spec, dtype):
    # Where weights are sharp, rounding decides otherwise which tokens merge.
    model = soft().train()
    with vidtok.attach(model, vision=spec) as handle:
        with torch.no_grad():
            want = model(pixels(4)).pooler_output
        with torch.autocast("cpu", dtype):
            out = model(pixels(4)).pooler_output
        size = handle.vision[0].size
        grads = gradients(model, out.float().square().mean())
    assert size.dtype == torch.float32 and torch.equal(size, size.round())
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
    cosine = nn.functional.cosine_similarity(out.float(), want, dim=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_a_number_keep_sizes_exact(dtype):
    model = clip().to(dtype)
    with torch.no_grad(), vidtok.attach(model, vision=SMALL) as handle:
        out = model(pixels(8).to(dtype)).pooler_output
        size = handle.vision[0].size
    assert out.dtype == dtype and out.isfinite().all()
    assert size.dtype == torch.float32 and torch.equal(size.sum(1), torch.full((2,), 68.0))


def test_a_mean_by_size_stays_in_fp32_under_autocast():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[1.0, 3, 2, 300, 7]]).expand(2, 5)
    want = vidtok.merge.weighted_mean(x, size)
    with torch.autocast("cpu", torch.bfloat16):
        got = vidtok.merge.weighted_mean(x, size)
    assert torch.equal(got, want)


@pytest.mark.parametrize("spec", SPECS)
def test_dropout_is_drawn_anew_and_off_in_eval(spec):
    model = clip(attention_dropout=0.3).train()
    with torch.no_grad(), vidtok.attach(model, vision=spec):
        first, second = (model(pixels(4)).pooler_output for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        first, second = (model(pixels(4)).pooler_output for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        assert not torch.equal(model(pixels(4)).pooler_output, first)


@pytest.mark.parametrize("spec", SPECS)
def test_passes_without_gradients_between_those_with(spec):
    model = clip().train()
    with vidtok.attach(model, vision=spec):
        want = gradients(model, model(pixels(4)).pooler_output.square().mean())
        out = model(pixels(4)).pooler_output
        with torch.no_grad():
            plain = model(pixels(8)).pooler_output
            with torch.enable_grad():
                model(pixels(4)).pooler_output.sum().backward()
        with torch.inference_mode():
            assert torch.equal(model(pixels(8)).pooler_output, plain)
        assert same(gradients(model, out.square().mean()), want)


def test_a_training_step_learns():
    model = clip().train()
    with vidtok.attach(model, vision=SMALL + ",frame_pos=true") as handle:
        own = handle.vision[0].positions
        optimizer = torch.optim.AdamW([*model.parameters(), *own.parameters()], lr=1e-2)
        target, losses = torch.randn(8, 32, generator=torch.Generator().manual_seed(5)), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(pixels(8)).pooler_output - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------ graphs that stay
@pytest.mark.parametrize("spec", [*SPECS, "tome:r=3,trace=true"])
def test_no_graph_is_kept_alive(spec):
    """After the outputs are gone, what a pass kept for its backward one is gone too."""
    model, seen = clip().train(), []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(lambda *call: seen.append(StorageWeakRef(call[-1].untyped_storage())))
    with vidtok.attach(model, vision=spec) as handle:
        out = model(pixels(4)).pooler_output
        assert len(seen) > 20 and sum(not ref.expired() for ref in seen) > 20
        del out
        assert all(ref.expired() for ref in seen) and handle.vision[0].size is not None


def test_run_holds_few_numbers():
    model = clip().train()
    with vidtok.attach(model, vision="tome:r=3,trace=true") as handle:
        model(pixels(4)).pooler_output.sum().backward()
        run = handle.vision[0].run
    plans = [p for p in run.plans if p is not None]
    held = [*run.size, *(t for p in plans for t in (p.anchor, p.member, p.offset, p.weight))]
    numbers = sum(t.numel() for t in held if t is not None)
    assert numbers < 10 * 4 * 17 * 4


def test_own_blocks_equal_loops_in_training():
    model, own = Own().train(), options(output="video")
    noise = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(4))
    with put(model, own):
        got = gradients(model, model(noise).square().mean())
    want = gradients(model, by_loops(model.stages["blocks"], Mine(), noise, own)[0].x.square().mean())
    assert near(got, want)


def test_attend_without_merges_changes_no_gradient():
    model = Own()
    want = gradients(model, model(tokens()).square().mean())
    with attach_any(model, "tome:r=0", blocks="stages.blocks", halves=(attend, feed)):
        assert same(gradients(model, model(tokens()).square().mean()), want)


# ------------------------------------------------------------------ memory
def kept_bytes(model, images) -> int:
    """Bytes of the storages that autograd keeps, those of parameters and of the images apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), images)}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(images).pooler_output
    total = sum(size for size, _ in seen.values())
    del out
    return total


@pytest.mark.parametrize(
    "vision", ["tome:r=24", "tempme:frames=4,r=24,merge_layers=[2,3],merge_frames=[2,2],cross=0.4"]
)
def test_what_is_kept_falls_with_the_tokens(vision):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=1, image_size=56, patch_size=4
    )
    model, images = CLIPVisionModel(config).train(), torch.randn(4, 3, 56, 56)
    plain = kept_bytes(model, images)
    with vidtok.attach(model, vision=vision) as handle:
        kept = kept_bytes(model, images)
        blocks = handle.report().vision[0].blocks
    whole = 4 * 197 * len(blocks)
    attended, fed = (sum(getattr(b, name) for b in blocks) / whole for name in ("tokens", "merged"))
    # Attention keeps six numbers a channel (its input, normed, q, k, v, out), the MLP two and three of four times that;
    # what is in front of the blocks does not fall.
    expected = (6 * attended + 14 * fed) / 20
    assert fed < attended < 0.8
    assert kept / plain < expected + 0.05
