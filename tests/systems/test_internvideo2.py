"""InternVideo2's vision encoder against loops, alone and with merging tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vidtok
from tests.merge import reference
from vidtok.merge import ToMe, attach_any
from vidtok.models.towers.internvideo2 import InternVideo2Block
from vidtok.systems import internvideo2
from vidtok.systems.internvideo2 import InternVideo2, InternVideo2Config, Vision, layers, positions

LAYERS, HEADS, WIDTH, MERGES = 3, 2, 32, [7, 5, 4]
TINY = {
    "img_size": 28, "num_frames": 4, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "init_values": 0.6,
    "attn_pool_num_heads": 4, "clip_embed_dim": 8,
}  # fmt: skip


def make(**options) -> InternVideo2:
    torch.manual_seed(0)
    model = InternVideo2(InternVideo2Config(**{**TINY, **options})).eval()
    for name, p in model.named_parameters():
        if "pos_embed" not in name:
            p.data.normal_(0.0 if p.dim() > 1 else 0.4, 0.5 if "qkv" in name or "cross_attn" in name else 0.2)
    return model


def clip(batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, frames, 28, 28, generator=torch.Generator().manual_seed(1))


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


def published(depth: int = 40, frames: int = 4, **changes: tuple[int, ...]) -> dict[str, Tensor]:
    """The published names and shapes of stage 2, 1B, without memory behind them."""
    c, hidden = 1408, 6144
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, 1 + frames * 256, c),
        "patch_embed.proj.weight": (c, 3, 1, 14, 14),
        "patch_embed.proj.bias": (c,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (c,),
            f"blocks.{i}.norm2.weight": (c,),
            f"blocks.{i}.attn.qkv.weight": (3 * c, c),
            f"blocks.{i}.attn.q_norm.weight": (c,),
            f"blocks.{i}.attn.k_norm.weight": (c,),
            f"blocks.{i}.attn.proj.weight": (c, c),
            f"blocks.{i}.attn.proj.bias": (c,),
            f"blocks.{i}.ls1.gamma": (c,),
            f"blocks.{i}.ls2.gamma": (c,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, c),
            f"blocks.{i}.mlp.fc1.bias": (hidden,),
            f"blocks.{i}.mlp.fc2.weight": (c, hidden),
            f"blocks.{i}.mlp.fc2.bias": (c,),
        }
    for part in "qkv":
        shapes |= {
            f"clip_projector.norm1_{part}.weight": (c,), f"clip_projector.norm1_{part}.bias": (c,),
            f"clip_projector.cross_attn.{part}.weight": (c, c), f"clip_projector.cross_attn.{part}_bias": (c,),
        }  # fmt: skip
    shapes |= {"clip_projector.cross_attn.proj.weight": (768, c), "clip_projector.cross_attn.proj.bias": (768,)}
    return {name: torch.empty(shape, device="meta") for name, shape in {**shapes, **changes}.items()}


def test_the_published_names_and_shapes():
    state = published()
    config = internvideo2.read_config(state)
    assert config == InternVideo2Config() and config.hidden == 6144
    with torch.device("meta"):
        model = InternVideo2(config)
    internvideo2.load_state_dict(model, state)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert 1.0e9 < sum(p.numel() for p in model.parameters()) < 1.1e9


def test_separate_positions_and_those_of_images():
    places = {"pos_embed_cls": (1, 1, 1408), "pos_embed_spatial": (1, 256, 1408), "pos_embed_temporal": (1, 4, 1408)}
    state = published(1, **places)
    del state["pos_embed"]
    assert internvideo2.read_config(state) == InternVideo2Config(depth=1, sep_pos_embed=True)
    state = published(1, img_pos_embed=(1, 257, 1408))
    assert internvideo2.read_config(state) == InternVideo2Config(depth=1, sep_image_video_pos_embed=True)


def wrapped(state: dict[str, Tensor]) -> dict:
    """As a whole model has them, with what only training reads."""
    extra = {
        "text_encoder.embeddings.weight": torch.zeros(2), "temp": torch.zeros(()), "vision_proj.weight": torch.zeros(2),
        "vision_encoder.clip_decoder.0.head.weight": torch.zeros(2), "vision_encoder.clip_pos_embed": torch.zeros(2),
        "clip_teacher.patch_embed.proj.weight": torch.zeros(2),
        "vision_encoder.final_clip_decoder.norm.bias": torch.zeros(2),
    }  # fmt: skip
    return {"module": {**{f"vision_encoder.{key}": value for key, value in state.items()}, **extra}}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_load(tmp_path, suffix):
    from safetensors.torch import save_file

    model, path = make(), tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(wrapped(model.state_dict()), path)
    else:
        save_file(model.state_dict(), path)
    other = internvideo2.load(path, num_heads=HEADS, attn_pool_num_heads=4, img_size=28)
    with torch.no_grad():
        assert torch.equal(other(clip()).pooled, model(clip()).pooled)
    with pytest.raises(ValueError, match="expected a file of weights, got none at"):
        internvideo2.load(tmp_path / "missing.pt")


def test_a_width_that_its_ratio_rounds_down():
    """A ratio of two widths times the second may end below the first."""
    assert int(112 * (488 / 112)) == 487
    state = make(embed_dim=112, mlp_ratio=488.5 / 112).state_dict()
    config = internvideo2.read_config(state, num_heads=HEADS, attn_pool_num_heads=4, img_size=28)
    assert config.hidden == 488
    internvideo2.load_state_dict(InternVideo2(config), state)


def test_keys_that_differ_are_named():
    model = make()
    state = model.state_dict()
    for name in [key for key in state if key.startswith(("blocks.0", "blocks.2"))]:
        del state[name]
    state |= {"decoder.weight": torch.zeros(1), "cls_token": torch.zeros(1, 1, 4)}
    with pytest.raises(ValueError) as error:
        internvideo2.load_state_dict(model, state)
    text = str(error.value)
    assert "26 missing (blocks.0.attn.k_norm.weight, blocks.0.attn.proj.bias" in text and "and 16 more)" in text
    assert "1 unexpected (decoder.weight)" in text
    assert "1 of another shape (cls_token [1, 1, 4] for [1, 1, 32])" in text
    with pytest.raises(ValueError, match=r"expected a state dict with one patch_embed.proj.weight, got 0 among 1 keys"):
        internvideo2.load_state_dict(model, {"a": torch.zeros(1)})


def test_other_frame_counts_only_when_asked():
    model, eight = make(), InternVideo2(InternVideo2Config(**{**TINY, "num_frames": 8}))
    with pytest.raises(ValueError, match=r"pos_embed \[1, 17, 32\] for \[1, 33, 32\]\); interpolate=True"):
        internvideo2.load_state_dict(eight, model.state_dict())
    internvideo2.load_state_dict(eight, model.state_dict(), interpolate=True)
    have, made = model.pos_embed[0, 1:].view(4, 4, WIDTH), eight.pos_embed[0, 1:].view(8, 4, WIDTH)
    assert torch.equal(eight.pos_embed[:, 0], model.pos_embed[:, 0])
    for step in range(8):
        at = min(max((step + 0.5) / 2 - 0.5, 0), 3)
        low = int(at)
        want = have[low] + (at - low) * (have[min(low + 1, 3)] - have[low])
        torch.testing.assert_close(made[step], want)


def test_positions_are_sines_and_cosines():
    table = positions.joint(WIDTH, (2, 2, 3))[0]
    assert table.shape == (13, WIDTH) and not table[0].any()
    time, row, column = 1, 1, 2
    got = table[1 + (time * 2 + row) * 3 + column]
    want = []
    for place, channels in ((time, 8), (column, 12), (row, 12)):
        angles = [place / 10000 ** (2 * i / channels) for i in range(channels // 2)]
        want += [torch.tensor(a).sin() for a in angles] + [torch.tensor(a).cos() for a in angles]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 225}, "img_size as a multiple of patch_size=14"),
        ({"num_heads": 5}, "embed_dim as a multiple of num_heads=5"),
        ({"tubelet_size": 3}, "num_frames as a multiple of tubelet_size=3"),
        ({"embed_dim": 1400, "num_heads": 10, "attn_pool_num_heads": 10}, "a multiple of 16"),
        ({"sep_pos_embed": True, "sep_image_video_pos_embed": True}, "got both"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InternVideo2Config(**options)


def test_the_result_has_names():
    assert Vision._fields == ("tokens", "pooled")
