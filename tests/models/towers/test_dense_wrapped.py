"""Towers in wrappers and compiled, what is refused, and other versions of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import vidtok
from tests.models.towers import dense
from tests.models.towers.dense import KINDS, MERGES, NAMES, close, inputs, make
from vidtok.merge import ToMe
from vidtok.models import towers, versions


# ---------------------------------------------------------------------- wrappers
def hooked(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(io_same_device=True))
    for module in model.modules():
        if module is not model:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", skip_keys=None))
    return hooks


@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_hooks_of_accelerate(kind):
    model = dense.pooled(kind)
    plain = copy.deepcopy(model)
    hooks = hooked(model)
    with torch.no_grad():
        with vidtok.attach(plain, vision=ToMe(r=MERGES)):
            want = plain(**inputs(kind)).logits
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            assert torch.equal(model(**inputs(kind)).logits, want)
            twin = copy.deepcopy(model)
        want = plain(**inputs(kind)).logits
        for other in (twin, model):
            assert torch.equal(other(**inputs(kind)).logits, want)
        hooks.remove_hook_from_submodules(model)
        assert torch.equal(model(**inputs(kind)).logits, want)


def test_hooks_removed_while_attached():
    model = make("vit")
    want, hooks = make("vit")(**inputs("vit")).last_hidden_state, hooked(model)
    with torch.no_grad():
        with vidtok.attach(model, vision=ToMe(r=MERGES)) as handle:
            hooks.remove_hook_from_submodules(model)
            assert model(**inputs("vit")).last_hidden_state.shape[1] == handle.vision[0].run.tokens[-1] == 22
        assert torch.equal(model(**inputs("vit")).last_hidden_state, want)


def test_inside_wrappers():
    model = make("vit")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)):
        want = model(**inputs("vit")).last_hidden_state

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    outer = Wrapper(Wrapper(model))
    # As adapters replace a linear layer.
    own = dense.part(dense.blocks(model)[0], "attention")
    own = getattr(own, "attention", own)
    name = "q_proj" if hasattr(own, "q_proj") else "query"
    setattr(own, name, nn.Sequential(getattr(own, name)))
    with torch.no_grad(), vidtok.attach(outer, vision=ToMe(r=MERGES)):
        assert torch.equal(outer(**inputs("vit")).last_hidden_state, want)


def test_distributed_data_parallel(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = dense.pooled("dinov2")
        grads = []
        for outer in (model, nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)):
            model.zero_grad()
            with vidtok.attach(outer, vision=ToMe(r=MERGES)):
                outer(**inputs("dinov2")).logits.square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert len(grads[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_before_and_after():
    model = dense.pooled("dinov2")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = model(**inputs("dinov2")).logits
        assert close(compiled(**inputs("dinov2")).logits, plain)
        with vidtok.attach(compiled, vision=ToMe(r=MERGES)):
            want = model(**inputs("dinov2")).logits
            assert not close(want, plain) and close(compiled(**inputs("dinov2")).logits, want)
        assert close(compiled(**inputs("dinov2")).logits, plain)


@pytest.mark.slow
def test_one_graph():
    model = make("siglip")
    with torch.no_grad(), vidtok.attach(model, vision=ToMe(r=MERGES)):
        want = model(**inputs("siglip")).pooler_output
        got = torch.compile(model, backend="eager", fullgraph=True)(**inputs("siglip")).pooler_output
    assert close(got, want)


@pytest.mark.slow
def test_blocks_compiled_one_by_one():
    model = make("vit")
    with torch.no_grad():
        plain = model(**inputs("vit")).last_hidden_state
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            want = model(**inputs("vit")).last_hidden_state
        blocks = dense.blocks(model)
        blocks[0].compile(backend="eager")
        blocks[1] = torch.compile(blocks[1], backend="eager")
        assert close(model(**inputs("vit")).last_hidden_state, plain)
        with vidtok.attach(model, vision=ToMe(r=MERGES)):
            assert close(model(**inputs("vit")).last_hidden_state, want)
        assert close(model(**inputs("vit")).last_hidden_state, plain)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ("tome:r=-1", "at least 0"),
        ("tome", "one of r, ratio and k"),
        (ToMe(r=[1, 2]), "each of the 3 layers, got 2"),
        ("tome:r=2,metric=query", "metric as one of"),
        ("tome:r=2,form=bias", "form as one of"),
    ],
)
def test_options_that_do_not_fit(vision, words):
    model = make("vit")
    with torch.no_grad():
        want = model(**inputs("vit")).last_hidden_state
    with pytest.raises(ValueError, match=words):
        vidtok.attach(model, vision=vision)
    with torch.no_grad():
        assert torch.equal(model(**inputs("vit")).last_hidden_state, want)


@pytest.mark.parametrize("mask", [torch.zeros(9, dtype=torch.bool), torch.zeros(3, 37, dtype=torch.bool)])
def test_a_mask_of_another_shape(mask):
    model = make("vit")
    with (
        torch.no_grad(),
        vidtok.attach(model, vision=ToMe(r=2, protected=mask)),
        pytest.raises(ValueError, match=r"protected of bool \[37\] or \[2, 37\]"),
    ):
        model(**inputs("vit"))


@pytest.mark.parametrize("kind", [name for name in ("dinov3_vit", "siglip2") if name in NAMES])
def test_across_frames_blocks_get_their_tokens_only(kind):
    model, given = make(kind), inputs(kind)
    if kind == "siglip2":
        given["pixel_attention_mask"][0, -4:] = 0
    with torch.no_grad():
        want = model(**given).last_hidden_state
        with (
            vidtok.attach(model, vision="tempme:frames=2,r=2,merge_layers=[1],merge_frames=[2]"),
            pytest.raises(
                ValueError, match=r"get their tokens only for .*, got (position_emb|arg|attention_m)"
            ) as error,
        ):
            model(**given)
        assert "\n" not in str(error.value) and "'tome' merges in each frame" in str(error.value)
        assert torch.equal(model(**given).last_hidden_state, want)


def test_a_model_without_a_tower():
    with pytest.raises(ValueError) as error:
        vidtok.attach(nn.Sequential(nn.Linear(2, 2)), vision="tome:r=2")
    text = str(error.value)
    assert "vidtok.merge.attach_any" in text and "docs/vision.md" in text and "\n" not in text


def test_a_block_with_another_forward():
    model = make("vit")
    block = dense.blocks(model)[1]
    block.forward = lambda x, *args, **kwargs: x
    with pytest.raises(ValueError, match="replaced"):
        vidtok.attach(model, vision="tome:r=2")
    assert not hasattr(dense.blocks(model)[0], "_vidtok")


# ---------------------------------------------------------------------- versions
@pytest.mark.parametrize("kind", NAMES)
def test_the_record_names_the_tower(kind):
    model = dense.pooled(kind) if KINDS[kind].pooled else make(kind)
    ((tower, family),) = towers.locate(model)
    found, replaced = versions.forwards(towers._relied(tower, family, [model]))
    record = versions.records()[transformers.__version__]
    assert not replaced and len(found) >= 3
    assert {name: record.get(name) for name in found} == found
    assert family.name == kind


def changed(monkeypatch):
    table = {version: dict(record) for version, record in versions.records().items()}
    for record in table.values():
        record["vit.ViTLayer.forward"] = "0" * 12
    monkeypatch.setattr(versions, "records", lambda: table)


def test_another_block_is_refused(monkeypatch):
    changed(monkeypatch)
    monkeypatch.setattr(versions, "installed", lambda: "6.1.0")
    with pytest.raises(ValueError, match=r"6\.1\.0, in which vit\.ViTLayer\.forward changed") as error:
        vidtok.attach(make("vit"), vision="tome:r=2")
    assert "4.57.6, 5.17.0, 5.23.0" in str(error.value) and "\n" not in str(error.value)
    vidtok.attach(make("clip"), vision="tome:r=2").restore()
    monkeypatch.setenv("VIDTOK_UNTESTED_TRANSFORMERS", "1")
    with pytest.warns(UserWarning, match="VIDTOK_UNTESTED_TRANSFORMERS"):
        vidtok.attach(make("vit"), vision="tome:r=2").restore()


def test_a_replaced_forward_is_refused(monkeypatch):
    model = make("vit")
    kind = type(dense.blocks(model)[0])
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    with pytest.raises(ValueError, match=r"ViTLayer\.forward replaced"):
        vidtok.attach(model, vision="tome:r=2")
