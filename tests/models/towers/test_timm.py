"""timm's towers with merging tokens against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vidtok
from tests.merge import reference
from tests.models.towers.libraries import (
    check_checkpointing,
    check_copies,
    check_pool,
    close,
    images,
    load,
    sharpen,
)
from vidtok.merge import ToMe

timm = load("timm")
LAYERS, HEADS, WIDTH, MERGES = 3, 2, 32, [5, 4, 2]
MODELS = {
    "vit": ("vit_base_patch16_224", {}),
    "vit_unfused": ("vit_base_patch16_224", {}),
    "deit_distilled": ("deit_base_distilled_patch16_224", {}),
    "mean": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "mean_max": ("vit_base_patch16_224", {"global_pool": "avgmax"}),
    "mean_of_all": ("vit_base_patch16_224", {"global_pool": "avg", "class_token": False, "fc_norm": False}),
    "map": ("vit_base_patch16_siglip_224", {}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"init_values": 0.7}),
    "swiglu": ("vit_giant_patch14_dinov2", {"init_values": 0.7, "mlp_ratio": 2.0}),
    "norms": ("vit_base_patch16_224", {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "post_norm": ("vit_base_patch16_224", {"block_fn": "ResPostBlock", "init_values": 0.7}),
    "eva": ("eva02_base_patch14_224", {}),
    "eva_giant": ("eva_giant_patch14_224", {}),
    "rotated": ("vit_base_patch16_rope_224", {"init_values": 0.7}),
    "rotated_by_heads": ("vit_base_patch16_rope_mixed_224", {"init_values": 0.7}),
    "dinov3": ("vit_base_patch16_dinov3", {"init_values": 0.7}),
}


def make(name: str):
    kind, options = MODELS[name]
    if "block_fn" in options:
        options = {**options, "block_fn": getattr(timm.models.vision_transformer, options["block_fn"])}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "num_classes": 5}
    model = sharpen(timm.create_model(kind, **{**size, **options}))
    for block in model.blocks:
        if name == "vit_unfused":
            block.attn.fused_attn = False
    return model


def rotate(x: Tensor, angles: Tensor | None, half: bool) -> Tensor:
    """``[D]`` turned by the sines and cosines ``[2 D]`` of one place, pair by pair."""
    if angles is None:
        return x
    d = x.shape[0]
    sin, cos = angles[:d], angles[d:]
    out = torch.empty_like(x)
    for i in range(d):
        partner, sign = ((i + d // 2) % d, -1 if i < d // 2 else 1) if half else (i ^ 1, 1 if i % 2 else -1)
        out[i] = x[i] * cos[i] + sign * x[partner] * sin[i]
    return out


def by_loops(model, image: Tensor, merges=MERGES, prop_attn: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens of one image after the last block, and their sizes."""
    x = model._pos_embed(model.patch_embed(image[None]))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)[0]
    prefix = model.num_prefix_tokens
    places, size = list(range(x.shape[0])), torch.ones(x.shape[0])
    for index, (block, r) in enumerate(zip(model.blocks, merges, strict=True)):
        attn, after = block.attn, type(block).__name__ == "ResPostBlock"
        y = x if after else block.norm1(x)
        if attn.qkv is None:
            q, k, v = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
        else:
            q, k, v = attn.qkv(y).chunk(3, -1)
            if getattr(attn, "q_bias", None) is not None:
                q, v = q + attn.q_bias, v + attn.v_bias
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            table = rope[index] if rope.dim() == 4 or (rope.dim() == 3 and rope.shape[0] == LAYERS) else rope
            for part in (q, k):
                turned = torch.stack([
                    torch.stack([
                        rotate(
                            part[h, t],
                            None if p < prefix else (table[h, p - prefix] if table.dim() == 3 else table[p - prefix]),
                            getattr(attn, "rotate_half", False),
                        )
                        for t, p in enumerate(places)
                    ])
                    for h in range(HEADS)
                ])  # fmt: skip
                part.copy_(turned)
        out = reference.attention(q, k, v, size if prop_attn else None, (WIDTH // HEADS) ** -0.5)
        out = attn.proj(attn.norm(out.transpose(0, 1).flatten(1)))
        gamma = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
        if after:
            out = block.norm1(out)
        elif hasattr(block, "ls1"):
            out = block.ls1(out)
        elif gamma[0] is not None:
            out = out * gamma[0]
        x = x + out
        places = [places[i] for i in reference.match(k.mean(0), r, prefix)[0]]
        x, size = reference.merge(x, k.mean(0), size, r, prefix)
        out = block.mlp(x if after else block.norm2(x))
        if after:
            out = block.norm2(out)
        elif hasattr(block, "ls2"):
            out = block.ls2(out)
        elif gamma[1] is not None:
            out = out * gamma[1]
        x = x + out
    return x, size


def head_by_loops(model, x: Tensor, size: Tensor) -> Tensor:
    """What the model says of one image's tokens: each repeated as often as it counts."""
    counts = size.long()
    return model.forward_head(torch.repeat_interleave(model.norm(x), counts, 0)[None])[0]


@pytest.mark.parametrize("name", MODELS)
def test_equals_loops(name):
    model = make(name)
    with torch.no_grad():
        plain = model(images())
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            features = model.forward_features(images())
            got = model(images())
            size = handle.vision[0].size
        assert torch.equal(model(images()), plain)
        assert size.sum(1).tolist() == [float(features.shape[1] + sum(MERGES))] * 2
        for i, image in enumerate(images()):
            x, sizes = by_loops(model, image)
            torch.testing.assert_close(size[i], sizes, rtol=0, atol=0)
            close(features[i], model.norm(x))
            # A distilled class token and its like stay in front, whatever is repeated behind them.
            close(got[i], head_by_loops(model, x, sizes))
            wrong = by_loops(model, image, prop_attn=False)[0]
            assert (x - wrong).norm() > 1e-3 * x.norm()
        assert (got - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("name", MODELS)
def test_no_merges_change_no_bit(name):
    model = make(name)
    with torch.no_grad():
        want = model(images())
        with vidtok.attach(model, vision="tome:r=0"):
            assert torch.equal(model(images()), want)
        model.train()
        want = model(images())
        with vidtok.attach(model, vision="tome:r=0"):
            assert torch.equal(model(images()), want)


@pytest.mark.parametrize("name", ["mean", "map", "mean_max"])
def test_pools_that_count_tokens_alike_differ(name, monkeypatch):
    check_pool(make(name), MERGES, "timm", monkeypatch)


@pytest.mark.parametrize("form", ["mask", "channel"])
def test_forms_agree(form):
    for name in ("vit", "vit_unfused", "rotated"):
        model = make(name)
        with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES, form=form)):
            got = model.forward_features(images())
            close(got[0], model.norm(by_loops(model, images()[0])[0]))


@pytest.mark.parametrize("name", ["vit", "eva", "mean"])
def test_checkpointing_changes_no_gradient(name):
    check_checkpointing(make(name), MERGES)


def test_a_mask_follows_the_tokens():
    """Padded patches are neither seen nor merged."""
    model = make("vit")
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[1, ..., 12:] = False
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=3"):
        want = model.forward_features(images(), attn_mask=mask)[1, 0]
        changed = images()
        changed[1, :, 24:] += 3
        close(model.forward_features(changed, attn_mask=mask)[1, 0], want)
        assert (model.forward_features(changed)[1, 0] - want).norm() > 1e-3 * want.norm()
        with pytest.raises(ValueError, match="expected attention without is_causal"):
            model(images(), is_causal=True)


def test_feature_maps_need_every_token():
    model = make("vit")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)):
        with pytest.raises(ValueError, match="output_fmt='NLC'"):
            model.forward_intermediates(images())
        _, parts = model.forward_intermediates(images(), output_fmt="NLC")
        assert [part.shape[1] for part in parts] == [11, 7, 5]


def test_a_head_that_reads_places_gets_every_token():
    model = make("map")
    model.attn_pool.pos_embed = torch.nn.Parameter(torch.randn(16, WIDTH))
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=[4, 3, 2])):
        assert model.forward_features(images()).shape[1] == 16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "got ParallelScalingBlock"),
        ({"attn_layer": "diff"}, "got DiffAttention"),
    ],
)
def test_blocks_that_do_not_fit_are_named(options, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, **options).eval()
    with torch.no_grad():
        want = model(images())
        with pytest.raises(ValueError, match=message):
            vidtok.attach(model, vision="tome:r=2")
        assert torch.equal(model(images()), want)


def test_copies_and_pickles_are_plain():
    model = make("mean")
    check_copies(model, MERGES, timm.models.vision_transformer.VisionTransformer)
    assert type(model) is timm.models.vision_transformer.VisionTransformer


def test_one_graph():
    model = make("mean")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)):
        want = model(images())
        got = torch.compile(model, fullgraph=True, backend="eager")(images())
    close(got, want)


def test_autocast():
    model = make("map")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(images()).float()).all()
