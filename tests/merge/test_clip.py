"""CLIP with merging tokens against loops."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vidtok
from tests.merge.reference import attention, merge
from vidtok.merge import ToMe
from vidtok.models.towers import _attention

LAYERS, HEADS, WIDTH = 4, 4, 64


def make(attention: str = "sdpa") -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=64,
        patch_size=8, attn_implementation=attention,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data *= 6 if "q_proj" in name or "k_proj" in name else 2.5
    return model


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def tower(model):
    return getattr(model, "vision_model", model)


def by_loops(model, image: Tensor, merges: list[int], prop_attn: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens and sizes of one image after the last layer."""
    own = tower(model)
    x = own.pre_layrnorm(own.embeddings(image[None]))[0]
    size = torch.ones(x.shape[0])
    for i, layer in enumerate(own.encoder.layers):
        heads = [
            part(layer.layer_norm1(x)).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        out = attention(*heads, size if prop_attn else None, (WIDTH // HEADS) ** -0.5)
        x = x + layer.self_attn.out_proj(out.transpose(0, 1).flatten(1))
        x, size = merge(x, heads[1].mean(0), size, merges[i], 1)
        x = x + layer.mlp(layer.layer_norm2(x))
    return x, size


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_equals_loops(implementation, form, prop_attn):
    model = make(implementation)
    merges = [8, 8, 6, 4]
    with torch.no_grad(), vidtok.attach(model, vision=vidtok.merge.ToMe(r=merges, form=form, prop_attn=prop_attn)) as h:
        out = model(pixels()).last_hidden_state
        size = h.vision[0].size
        for image, got, own in zip(pixels(), out, size, strict=True):
            want, sizes = by_loops(model, image, merges, prop_attn)
            torch.testing.assert_close(own, sizes, rtol=0, atol=0)
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_sizes_in_attention_matter():
    model = make()
    with torch.no_grad():
        with vidtok.attach(model, vision="tome:r=8"):
            with_sizes = model(pixels()).last_hidden_state
        with vidtok.attach(model, vision="tome:r=8,prop_attn=false"):
            without = model(pixels()).last_hidden_state
    assert (with_sizes - without).norm() > 0.01 * with_sizes.norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_merges_change_no_bit(implementation):
    model = make(implementation)
    with torch.no_grad():
        want = model(pixels())
        with vidtok.attach(model, vision="tome:r=0"):
            got = model(pixels())
        after = model(pixels())
    for other in (got, after):
        assert torch.equal(want.last_hidden_state, other.last_hidden_state)
        assert torch.equal(want.pooler_output, other.pooler_output)


def test_sizes_add_up():
    model = make()
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=8") as handle:
        model(pixels(3))
        merging = handle.vision[0]
    assert merging.size.shape == (3, 33)
    assert torch.equal(merging.size.sum(1), torch.full((3,), 65.0))
    assert merging.run.tokens == [65, 57, 49, 41, 33]


def test_unmerge_gives_each_token_its_copy():
    model = make()
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=8,trace=true") as handle:
        out = model(pixels()).last_hidden_state
        merging = handle.vision[0]
        full, plan = merging.unmerge(out), merging.trace()
    assert full.shape == (2, 65, WIDTH)
    assert plan.num_in == 2 * 65 and plan.num_out == 2 * 33
    flat, offset = full.flatten(0, 1), plan.offset.tolist()
    for i, row in enumerate(out.flatten(0, 1)):
        for member in plan.member[offset[i] : offset[i + 1]].tolist():
            assert torch.equal(flat[member], row)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    grads = []
    with vidtok.attach(model, vision="tome:r=8"):
        for _ in range(2):
            model.zero_grad()
            images = pixels().requires_grad_()
            model(images).last_hidden_state.square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.gradient_checkpointing_disable()
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_are_plain():
    model = make()
    with torch.no_grad():
        want = model(pixels()).last_hidden_state
        keys = list(model.state_dict())
        with vidtok.attach(model, vision="tome:r=8"):
            assert list(model.state_dict()) == keys
            assert isinstance(
                tower(model).encoder.layers[0],
                type(make().vision_model.encoder.layers[0])
                if hasattr(model, "vision_model")
                else type(make().encoder.layers[0]),
            )
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                assert torch.equal(other(pixels()).last_hidden_state, want)


def test_a_second_attachment_is_refused():
    model = make()
    with (
        vidtok.attach(model, vision="tome:r=8"),
        pytest.raises(ValueError, match="restore"),
    ):
        vidtok.attach(model, vision="tome:r=4")


def test_a_failed_call_leaves_nothing_behind():
    model = make()
    layer = tower(model).encoder.layers[2]
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=8"):
        want = model(pixels()).last_hidden_state
        handle = layer.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(pixels(4))
        handle.remove()
        assert torch.equal(model(pixels()).last_hidden_state, want)
        assert model(pixels(1)).last_hidden_state.shape == (1, 33, WIDTH)


def test_one_graph():
    model = make()
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=8"):
        want = model(pixels()).last_hidden_state
        got = torch.compile(model, fullgraph=True)(pixels()).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_names_of_attention_functions_are_plain():
    """Compiled code looks into the registry, and cannot where a key hashes in a way of its own."""
    name = _attention.register("flash_attention_2")
    assert name == "flash_attention_2" and name in ALL_ATTENTION_FUNCTIONS
    assert {type(key) for key in ALL_ATTENTION_FUNCTIONS} == {str}


@pytest.mark.parametrize("mask", [torch.ones(65), torch.ones(1, 65, 1, dtype=torch.bool)])
def test_masks_that_fit_no_tower_are_refused_at_once(mask):
    with pytest.raises(
        ValueError, match=re.escape("expected protected as an integer or bool [T] or [B, T], got torch")
    ):
        ToMe(r=2, protected=mask)
