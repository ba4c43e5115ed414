"""InternVideo2's vision encoder against loops, alone and with merging tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vidtok
from tests.merge import reference
from tests.systems.internvideo2_tiny import HEADS, LAYERS, MERGES, WIDTH, clip, make
from vidtok.merge import ToMe, attach_any
from vidtok.models.towers.internvideo2 import InternVideo2Block
from vidtok.systems.internvideo2 import layers


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight * row / (sum(v * v for v in row) / len(row) + 1e-6).sqrt() for row in x])


def by_loops(model, pixels: Tensor, merges=(0,) * LAYERS, prop_attn: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of one clip, their sizes, and the vector that is pooled from them."""
    weights, rows = dict(model.named_parameters()), [model.cls_token[0, 0]]
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    for time in range(pixels.shape[1]):
        for row in range(0, 28, 14):
            for column in range(0, 28, 14):
                patch = pixels[:, time, row : row + 14, column : column + 14].reshape(-1)
                rows.append(kernel @ patch + weights["patch_embed.proj.bias"])
    x = torch.stack(rows) + model.positions()[0]
    size = torch.ones(x.shape[0])
    for i, r in enumerate(merges):
        w = {name[len(f"blocks.{i}.") :]: p for name, p in weights.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (rms(x, w["norm1.weight"]) @ w["attn.qkv.weight"].T).chunk(3, -1)
        q, k = rms(q, w["attn.q_norm.weight"]), rms(k, w["attn.k_norm.weight"])
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in (q, k, v))
        out = reference.attention(q, k, v, size if prop_attn else None, (WIDTH // HEADS) ** -0.5)
        out = out.transpose(0, 1).flatten(1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        x = x + w["ls1.gamma"] * out
        x, size = reference.merge(x, k.mean(0), size, r, 1)
        y = F.gelu(rms(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + w["ls2.gamma"] * (y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    return x, size, pooled_by_loops(model, x, size)


def pooled_by_loops(model, x: Tensor, size: Tensor) -> Tensor:
    w = dict(model.clip_projector.named_parameters())
    every = torch.repeat_interleave(x, size.long(), 0)
    parts = []
    for name, y in (("q", every.mean(0, keepdim=True)), ("k", every), ("v", every)):
        y = F.layer_norm(y, (WIDTH,), w[f"norm1_{name}.weight"], w[f"norm1_{name}.bias"], 1e-5)
        y = y @ w[f"cross_attn.{name}.weight"].T + w[f"cross_attn.{name}_bias"]
        parts.append(y.unflatten(-1, (4, -1)).transpose(0, 1))
    out = reference.attention(*parts, None, (WIDTH // 4) ** -0.5).transpose(0, 1).flatten()
    return w["cross_attn.proj.weight"] @ out + w["cross_attn.proj.bias"]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("options", [{}, {"sep_pos_embed": True}])
def test_equals_loops(options):
    model = make(**options)
    with torch.no_grad():
        tokens, pooled = model(clip())
        for i, pixels in enumerate(clip()):
            want, _, vector = by_loops(model, pixels)
            close(tokens[i], want)
            close(pooled[i], vector)


@pytest.mark.parametrize("form", ["mask", "channel"])
def test_merging_equals_loops(form):
    model = make()
    with torch.no_grad():
        plain = model(clip())
        with vidtok.attach(model, vision=ToMe(r=MERGES, form=form)) as handle:
            tokens, pooled = model(clip())
            size = handle.vision[0].size
        assert torch.equal(model(clip()).pooled, plain.pooled)
        for i, pixels in enumerate(clip()):
            want, sizes, vector = by_loops(model, pixels, MERGES)
            assert torch.equal(size[i], sizes) and sizes.sum() == 17
            close(tokens[i], want)
            close(pooled[i], vector)
            assert (want - by_loops(model, pixels, MERGES, False)[0]).norm() > 1e-3 * want.norm()
            unweighed = model.clip_projector(tokens[i][None])[0]
            assert (unweighed - vector).norm() > 1e-3 * vector.norm()


@pytest.mark.parametrize("training", [False, True])
def test_no_merges_change_no_bit(training):
    model = make().train(training)
    with torch.no_grad():
        want = model(clip())
        with vidtok.attach(model, vision="tome:r=0"):
            got = model(clip())
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.pooled, want.pooled)


def test_as_a_tower_of_ones_own():
    model = make()
    with torch.no_grad():
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            want = model(clip(), x_vis_only=True)
        with attach_any(model, ToMe(r=MERGES), halves=InternVideo2Block()):
            assert torch.equal(model(clip(), x_vis_only=True), want)


@pytest.mark.parametrize("index", [-1, -2, -3])
def test_a_block_from_the_end(index):
    model, seen = make(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for options in (None, ToMe(r=MERGES), ToMe(r=MERGES, trace=True)):
            seen.clear()
            handle = vidtok.attach(model, vision=options) if options else None
            tokens, pooled = model(clip(), x_vis_return_idx=index)
            assert len(seen) == LAYERS + index + 1 and torch.equal(tokens, seen[-1])
            if handle is not None:
                size, (tower,) = handle.vision[0].size, handle.report().vision
                assert size.shape == tokens.shape[:2] and torch.equal(size.sum(1), torch.full((2,), 17.0))
                assert len(tower.blocks) == len(seen) and tower.blocks[-1].merged == 2 * tokens.shape[1]
                for i in range(2):
                    close(pooled[i], pooled_by_loops(model, tokens[i], size[i]))
                handle.restore()
    with pytest.raises(ValueError, match="expected x_vis_return_idx from -3 to -1, got 0"):
        model(clip(), x_vis_return_idx=0)


def test_pool_before_any_pass():
    model, x = make(), torch.randn(2, 5, WIDTH)
    want = model.pool(x)
    with vidtok.attach(model, vision="tome:r=5"):
        assert torch.equal(model.pool(x), want)


def test_every_token_back_after_any_block():
    model = make()
    with torch.no_grad(), attach_any(model, "tome:r=5", halves=InternVideo2Block(), full_length=True):
        assert model(clip(), x_vis_only=True).shape == (2, 17, WIDTH)
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=5") as handle:
        handle.vision[0].full_length = True
        tokens, pooled = model(clip(), x_vis_return_idx=-2)
        assert tokens.shape == (2, 17, WIDTH)
        for i in range(2):
            close(pooled[i], pooled_by_loops(model, tokens[i], torch.ones(17)))


def test_masked_tokens_are_left_out():
    model, mask = make(), torch.zeros(2, 17, dtype=torch.bool)
    mask[0, 5:9] = mask[1, 1:5] = True
    with torch.no_grad():
        want = model(clip(), mask).tokens
        changed = clip()
        changed[0, :, 1] += 9  # the second frame, whose patches are 5 to 8
        assert want.shape == (2, 13, WIDTH) and torch.equal(model(changed, mask).tokens, want)
    mask[0, 9] = True
    with pytest.raises(ValueError, match="as many True in every row"):
        model(clip(), mask)


def test_images_have_positions_of_their_own():
    for options in ({}, {"sep_pos_embed": True}, {"sep_image_video_pos_embed": True}):
        model = make(**options)
        with torch.no_grad():
            assert model(clip(frames=1), use_image=True).tokens.shape == (2, 5, WIDTH)
    assert torch.equal(model.positions(image=True), model.img_pos_embed)
    with pytest.raises(ValueError, match=r"expected pixels \[B, 3, 4, 28, 28\], got torch.float32 \[2, 3, 1, 28, 28\]"):
        model(clip(frames=1))


@pytest.mark.parametrize("merging", [False, True])
def test_checkpointing_changes_no_gradient(merging):
    model, grads = make(drop_path_rate=0.3).train(), []
    handle = vidtok.attach(model, vision=ToMe(r=MERGES)) if merging else None
    for on in (False, True):
        (model.gradient_checkpointing_enable if on else model.gradient_checkpointing_disable)()
        model.zero_grad()
        torch.manual_seed(3)
        (model(clip()).pooled.square().mean() + model(2 * clip(3)).pooled.square().mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert all(g.abs().sum() > 0 for g in grads[0])
    if handle is not None:
        handle.restore()


def test_bf16():
    model = make()
    with torch.no_grad():
        want = model(clip()).pooled
        half = copy.deepcopy(model).bfloat16()
        with vidtok.attach(half, vision="tome:r=1"):
            assert half(clip()).tokens.shape == (2, 14, WIDTH)
        got = half(clip()).pooled
        assert got.dtype == torch.bfloat16 and (got - want).norm() < 0.1 * want.norm()


def test_flash_attention_where_it_is_there(monkeypatch):
    calls = []

    def flash(q, k, v, softmax_scale):
        calls.append(q.shape)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    model = make()
    with torch.no_grad():
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            want = model(clip()).tokens
        with pytest.raises(ValueError, match="expected FlashAttention to be installed"):
            model.use_flash(True)
            model(clip())
        model.use_flash()
        monkeypatch.setattr(layers, "flash_function", lambda: flash)
        monkeypatch.setattr(layers, "flash_fits", lambda q: True)
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            close(model(clip()).tokens, want)
        # [B, T, H, D], in which log(size) takes channels of its own.
        assert [shape[-1] for shape in calls] == [16, 24, 24] and calls[0][1:3] == (17, HEADS)
        model.use_flash(False)
        model(clip())
        assert len(calls) == 3


# ------------------------------------------------------------------ weights
