"""Towers inside other models: heads that pool, and models that read every token."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import vidtok
from tests.models.towers import dense
from tests.models.towers.dense import KINDS, MERGES, NAMES, by_loops, by_query, close, inputs, make, of
from vidtok.merge import ToMe
from vidtok.models.towers import _heads

POOLED = [name for name in NAMES if KINDS[name].pooled]


def logits_by_loops(model, kind, row):
    """A classifier's answer for one image, its tokens counted by size."""
    prefix = KINDS[kind].prefix
    want = by_loops(model, of(row, inputs(kind)), MERGES, prefix)
    mean = (want.size[prefix:, None] * want.x[prefix:]).sum(0) / want.size[prefix:].sum()
    if kind.startswith("dinov2"):
        mean = torch.cat([want.x[0], mean])
    if kind == "videomae":
        mean = model.fc_norm(mean)
    return model.classifier(mean)


# ---------------------------------------------------------------------- heads
@pytest.mark.parametrize("kind", POOLED)
def test_classifiers_weigh_by_size(kind, monkeypatch):
    model = dense.pooled(kind)
    given = inputs(kind)
    with torch.no_grad():
        plain = model(**given).logits
        want = torch.stack([logits_by_loops(model, kind, row) for row in range(2)])
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            assert close(model(**given).logits, want)
            assert close(model(**given, return_dict=False)[0], want)
        assert torch.equal(model(**given).logits, plain)
        with vidtok.attach(model, vision="tome:r=0"):
            assert torch.equal(model(**given).logits, plain)
        # Without the weights the mean is another one; SigLIP2's is over tokens that were given back.
        monkeypatch.setattr(_heads, "sizes", lambda merging: None)
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            assert close(model(**given).logits, want, 1e-3) == (kind == "siglip2")


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_pooling_query_weighs_by_size(kind, monkeypatch):
    model = make(kind)
    with torch.no_grad():
        loops = [by_loops(model, of(row, inputs(kind)), MERGES, 0) for row in range(2)]
        want = torch.stack([by_query(dense.core(model).head, one.x, one.size) for one in loops])
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            assert close(model(**inputs(kind)).pooler_output, want)
        monkeypatch.setattr(_heads, "sizes", lambda merging: None)
        if kind == "siglip":
            with vidtok.attach(model, vision=ToMe(r=MERGES)):
                assert not close(model(**inputs(kind)).pooler_output, want, 1e-3)


def test_a_masked_mean_leaves_padding_out():
    model, given = dense.pooled("siglip2"), inputs("siglip2")
    given["spatial_shapes"] = torch.tensor([[6, 6], [4, 5]])
    given["pixel_attention_mask"][1, 20:] = 0
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=3)):
        got = model(**given).logits
        want = by_loops(model, of(1, given), [3, 3, 3], 0, hidden=lambda place: place >= 20)
        seen = [t for t, was in enumerate(want.place) if was < 20]
        mean = (want.size[seen, None] * want.x[seen]).sum(0) / 20
        assert close(got[1], model.classifier(mean))


def test_a_head_forgets_the_tokens_of_a_failed_call():
    model = dense.pooled("dinov2")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)):
        want = model(**inputs("dinov2")).logits
        handle = model.classifier.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(**inputs("dinov2", 3))
        handle.remove()
        x = torch.randn(3, 2 * dense.WIDTH)
        assert torch.equal(model.classifier(x), nn.functional.linear(x, model.classifier.weight, model.classifier.bias))
        assert torch.equal(model(**inputs("dinov2")).logits, want)


# ---------------------------------------------------------------------- models that read every token
def test_models_that_paint_get_every_token():
    options = {**dense.COMMON, "encoder_stride": dense.PATCH}
    vit = dense.sharpen(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**options)))
    deit = dense.sharpen(transformers.DeiTForMaskedImageModeling(transformers.DeiTConfig(**options)))
    for model, prefix in ((vit, 1), (deit, 2)):
        given = inputs("vit")
        with torch.no_grad():
            want = model(**given)
            with vidtok.attach(model, vision="tome:r=0"):
                assert torch.equal(model(**given).reconstruction, want.reconstruction)
            with vidtok.attach(model, vision="tome:r=4") as handle:
                out = model(**given, output_hidden_states=True)
        assert out.reconstruction.shape == want.reconstruction.shape
        assert handle.vision[0].size.shape[1] == 36 + prefix - 12
        assert {x.shape[1] for x in out.hidden_states} == {36 + prefix}


def test_video_pretraining_gets_every_token():
    config = transformers.VideoMAEConfig(
        **{**dense.COMMON, **KINDS["videomae"].options}, decoder_hidden_size=16, decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1, decoder_intermediate_size=16,
    )  # fmt: skip
    model = dense.sharpen(transformers.VideoMAEForPreTraining(config))
    masked = torch.arange(32).remainder(2).bool().expand(2, -1)
    with torch.no_grad():
        want = model(**inputs("videomae"), bool_masked_pos=masked).logits
        with vidtok.attach(model, vision="tome:r=2"):
            got = model(**inputs("videomae"), bool_masked_pos=masked).logits
    assert got.shape == want.shape and not torch.equal(got, want)


BACKBONES = {
    "dinov2": "Dinov2Backbone",
    "dinov2_with_registers": "Dinov2WithRegistersBackbone",
    "dinov3_vit": "DINOv3ViTBackbone",
}


@pytest.mark.parametrize("kind", [kind for kind, name in BACKBONES.items() if hasattr(transformers, name)])
def test_feature_maps_are_of_every_token(kind):
    family, prefix = KINDS[kind], KINDS[kind].prefix
    config = getattr(transformers, family.config)(
        **{**dense.COMMON, **family.options}, out_features=["stage1", "stage2", "stage3"], apply_layernorm=False
    )
    model = dense.sharpen(getattr(transformers, BACKBONES[kind])(config))
    with torch.no_grad():
        plain = model(**inputs(kind)).feature_maps
        with vidtok.attach(model, vision="tome:r=0"):
            assert all(torch.equal(a, b) for a, b in zip(model(**inputs(kind)).feature_maps, plain, strict=True))
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            maps = model(**inputs(kind)).feature_maps
            assert handle.vision[0].run.tokens[-1] == prefix + 21
        want = by_loops(model, of(0, inputs(kind)), MERGES, prefix)
        for i, got in enumerate(maps, 1):
            full = want.states[i][want.owners[i]]
            full = model.norm(full) if kind == "dinov3_vit" and i == 3 else full
            assert close(got[0], full[prefix:].T.reshape(-1, 6, 6))
        assert all(torch.equal(a, b) for a, b in zip(model(**inputs(kind)).feature_maps, plain, strict=True))


# ---------------------------------------------------------------------- models of two towers
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_image_and_text(kind):
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        vision_config={**dense.COMMON, "projection_dim": 16},
        text_config={**text, "vocab_size": 64, "eos_token_id": 3, "projection_size": dense.WIDTH},
    )
    model = dense.sharpen(getattr(transformers, f"{name}Model")(config))
    ids = torch.tensor([[5, 9, 4, 3]])
    given = {"input_ids": ids, **inputs(kind)}
    with torch.no_grad():
        plain = model(**given)
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            out = model(**given)
            model.set_attn_implementation("eager")
            other = model(**given)
            model.set_attn_implementation("sdpa")
            assert len(handle.vision) == 1 and handle.vision[0].run.tokens[-1] == 21 + KINDS[kind].prefix
        # The text tower is written as the other is, and stays as it was.
        assert torch.equal(out.text_embeds, plain.text_embeds)
        assert not torch.equal(out.image_embeds, plain.image_embeds)
        assert close(other.image_embeds, out.image_embeds)
        tower = dense.core(model)
        want = by_loops(tower, of(0, inputs(kind)), MERGES, KINDS[kind].prefix)
        assert close(out.vision_model_output.last_hidden_state[0], want.x)
        assert torch.equal(model(**given).image_embeds, plain.image_embeds)


def test_inside_a_language_model_every_token_comes_back():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**dense.COMMON),
        text_config=transformers.LlamaConfig(**text, vocab_size=64), image_token_index=60, image_token_id=60,
    )  # fmt: skip
    model = dense.sharpen(transformers.LlavaForConditionalGeneration(config))
    ids = torch.tensor([[5] + [60] * 36 + [7, 9]])
    given = {"input_ids": ids, **inputs("clip", 1)}
    with torch.no_grad():
        plain = model(**given).logits
        # It reads what the last block but one gives.
        with vidtok.attach(model, vision="tome:r=0"):
            assert torch.equal(model(**given).logits, plain)
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            got = model(**given).logits
            assert handle.vision[0].run.tokens == [37, 31, 26, 22]
    assert got.shape == plain.shape and not torch.equal(got, plain)
