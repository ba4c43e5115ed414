"""open_clip's towers with merging tokens against loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

load("timm")
open_clip = load("open_clip")
LAYERS, HEADS, WIDTH, MERGES = 3, 2, 32, [5, 4, 2]
POOLER = {"output_dim": WIDTH, "attn_pooler_queries": 4, "attn_pooler_heads": HEADS}
KINDS = {
    "class_token": {},
    "mean": {"pool_type": "avg"},
    "mean_before_norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "scaled": {"ls_init_value": 0.7},
    "custom": {
        "block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True
    },
    "attention_pool": {"attentional_pool": True, **POOLER},
    "two_pools": {"attentional_pool": "parallel", **POOLER},
}  # fmt: skip


def make(name: str):
    shape = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_ratio": 2.0}
    return sharpen(open_clip.transformer.VisionTransformer(**{**shape, "output_dim": 16, **KINDS[name]}))


def by_loops(model, image: Tensor, merges=MERGES, prop_attn: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens of one image after the last block, and their sizes."""
    x = model._embeds(image[None])[0]
    size = torch.ones(x.shape[0])
    for block, r in zip(model.transformer.resblocks, merges, strict=True):
        attn = block.attn
        q, k, v = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in (q, k, v))
        if hasattr(attn, "ln_q"):
            q, k = attn.ln_q(q), attn.ln_k(k)
        out = reference.attention(q, k, v, size if prop_attn else None, (WIDTH // HEADS) ** -0.5)
        if hasattr(attn, "ln_inner"):
            out = attn.ln_inner((out * attn.head_scale).transpose(0, 1).flatten(1))
            out = block.ln_attn(attn.out_proj(out))
        else:
            out = attn.out_proj(out.transpose(0, 1).flatten(1))
        x = x + block.ls_1(out)
        x, size = reference.merge(x, k.mean(0), size, r, 1)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, size


def head_by_loops(model, x: Tensor, size: Tensor) -> Tensor:
    """What the model says of one image's tokens: each repeated as often as it counts."""
    return (model._pool(torch.repeat_interleave(x, size.long(), 0)[None])[0] @ model.proj)[0]


@pytest.mark.parametrize("name", KINDS)
def test_equals_loops(name):
    model = make(name)
    with torch.no_grad():
        plain = model(images())
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            tokens = model.transformer(model._embeds(images()))
            got = model(images())
            size = handle.vision[0].size
        assert torch.equal(model(images()), plain)
        assert size.sum(1).tolist() == [17.0] * 2
        for i, image in enumerate(images()):
            x, sizes = by_loops(model, image)
            torch.testing.assert_close(size[i], sizes, rtol=0, atol=0)
            close(tokens[i], x)
            close(got[i], head_by_loops(model, x, sizes))
            assert (x - by_loops(model, image, prop_attn=False)[0]).norm() > 1e-3 * x.norm()
        blocks = handle.report().vision[0].blocks
        assert [block.merged for block in blocks] == [24, 16, 12]
        width, hidden, heads = 32, 64, 2
        # Projections and scores of the first block, its comparison, and what its MLP takes on the tokens left.
        assert name == "custom" or blocks[0].flops == (
            2 * 34 * 4 * width * width + 4 * width * 2 * 17 * 17 + 2 * 2 * 9 * 8 * (width // heads)
            + 2 * 24 * 2 * width * hidden
        )  # fmt: skip
        assert (got - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_no_merges_change_no_bit(name, training):
    model = make(name).train(training)
    with torch.no_grad():
        want = model(images())
        with vidtok.attach(model, vision="tome:r=0"):
            assert torch.equal(model(images()), want)


@pytest.mark.parametrize("name", ["mean", "attention_pool", "two_pools"])
def test_pools_that_count_tokens_alike_differ(name, monkeypatch):
    check_pool(make(name), MERGES, "open_clip", monkeypatch)


def test_forms_agree():
    for name in ("class_token", "custom"):
        model = make(name)
        with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES, form="channel")):
            close(model.transformer(model._embeds(images()))[0], by_loops(model, images()[0])[0])


def test_checkpointing_changes_no_gradient():
    check_checkpointing(make("mean"), MERGES)


def clip(vision: dict):
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    return sharpen(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


def test_a_whole_model():
    """Only the vision tower of a model with two merges."""
    model = clip({"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS})
    text = torch.arange(16).view(2, 8)
    with torch.no_grad():
        plain = model.encode_text(text)
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            got = model.encode_image(images())
            assert torch.equal(model.encode_text(text), plain) and len(handle.vision) == 1
            x, size = by_loops(model.visual, images()[0])
            close(got[0], head_by_loops(model.visual, x, size))


def test_a_timm_tower():
    tower = open_clip.timm_model.TimmModel("vit_tiny_patch16_224", 16, pool="avg", proj="linear")
    sharpen(tower)
    with torch.no_grad():
        plain = tower(images(1, 224))
        with vidtok.attach(tower, vision="tome:r=0"):
            assert torch.equal(tower(images(1, 224)), plain)
        with vidtok.attach(tower, vision="tome:r=8") as handle:
            got = tower(images(1, 224))
            assert handle.vision[0].size.sum() == 197
            x, size = tower.trunk.forward_features(images(1, 224))[0], handle.vision[0].size[0]
            pooled = torch.repeat_interleave(x[1:], size[1:].long(), 0).mean(0)
            close(got[0], tower.head(pooled[None])[0])


def test_blocks_that_do_not_fit_are_named():
    model = make("class_token")
    model.transformer.resblocks[1].attn.batch_first = False
    with pytest.raises(ValueError, match=r"attention over \[B, T, C\]"):
        vidtok.attach(model, vision="tome:r=2")
    with pytest.raises(ValueError, match="scaled cosines"):
        vidtok.attach(
            open_clip.transformer.VisionTransformer(32, 8, 32, 1, 2, 2.0, block_type="custom", scaled_cosine_attn=True),
            vision="tome:r=2",
        )


def test_copies_and_pickles_are_plain():
    check_copies(make("two_pools"), MERGES, open_clip.transformer.VisionTransformer)
