"""Tokens that merge in the vision towers of video-language models."""

from __future__ import annotations

import importlib
from functools import lru_cache

import pytest
import torch

import vidtok
from tests.models import tiny
from tests.models.test_zoo import far, logits, uncached
from tests.models.towers import loops, test_windowed
from tests.models.zoo._common import sharpen
from vidtok.merge import ToMe
from vidtok.merge.packed import PackedMerging
from vidtok.models import towers

#: Families whose towers merge, and the tower's class of some whose towers do not.
CORE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl")
MORE = (
    "cohere_compass", "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "gemma3", "glm46v",
    "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "hyperclovax_vision_v2", "kimi_k25", "llava_next", "muse_glimmer",
    "muse_spark", "qwen2_5_omni", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp",
    "video_llama_3", "video_llava",
)  # fmt: skip
OTHERS = {
    "gemma4": "Gemma4VisionModel",
    "lfm3_vl": "Lfm3VlVisionModel",
    "minimax_m3_vl": "MiniMaxM3VLVisionModel",
    "mistral3": "PixtralVisionModel",
    "molmo2": "Molmo2",
    "smolvlm": "SmolVLMVisionTransformer",
}


def family(name):
    return importlib.import_module(f"tests.models.zoo.{name}")


def there(names):
    """Those that the installed transformers has."""
    return [name for name in names if tiny.VERSION >= family(name).MIN_VERSION]


@lru_cache(maxsize=2)
def made(name):
    module = family(name)
    return module.make("sdpa"), module.batch(module.ROWS)


@pytest.mark.parametrize("name", [*there(CORE), *(pytest.param(name, marks=pytest.mark.slow) for name in there(MORE))])
def test_rows(name):
    """Without merges no bit changes; with them cached and alone are the same, and the features are others."""
    module, (model, inputs) = family(name), made(name)
    whole = logits(model, inputs)
    with vidtok.attach(model, vision="tome:r=0"):
        assert torch.equal(logits(model, inputs), whole)
    with vidtok.attach(model, vision="tome:r=2") as handle:
        got, out = tiny.generate(model, inputs, 2)
        scale = got.abs().max()
        for i in range(len(module.ROWS)):
            one = module.row(inputs, module.ROWS, i)
            assert far(got[i : i + 1], uncached(model, one, out.sequences[i : i + 1, -2:])) < 2e-5 * scale
        merged = logits(model, inputs)
        assert handle.vision[0].run.tokens[-1] < handle.vision[0].run.tokens[0]
        (tower, *_) = handle.report().vision
        assert 0 < tower.flops_removed < tower.flops_whole and tower.seconds > 0
        held = isinstance(handle.vision[0], PackedMerging)
    assert far(merged[:, -1], whole[:, -1]) > 1e-3 * scale
    assert torch.equal(logits(model, inputs), whole)
    if held:
        equals_loops(model, inputs)


def equals_loops(model, inputs):
    """What leaves the last block is what loops over sequences give."""
    ((own, kind),) = towers.locate(model)
    blocks = kind.find_blocks(own)
    with loops.Recorded(blocks) as plain:
        logits(model, inputs)
    with torch.no_grad():
        want = loops.by_modules(blocks, plain.calls, 2)
    with vidtok.attach(model, vision="tome:r=2"), loops.Recorded(blocks) as merged:
        logits(model, inputs)
    assert len(plain.calls) == len(blocks)
    assert (merged.last - want).norm() <= 1e-5 * want.norm()
    assert (plain.last - want).norm() > 1e-2 * want.norm()


@pytest.mark.parametrize("name", there(OTHERS))
def test_other_towers_are_refused_by_name(name):
    model = family(name).make("sdpa")
    with pytest.raises(ValueError, match=OTHERS[name]) as caught:
        vidtok.attach(model, vision="tome:r=2")
    assert str(caught.value).count(". ") == 0


# ---------------------------------------------------------------------- against loops
def _with(out, features):
    """A tower's output with other features."""
    if isinstance(out, torch.Tensor):
        return features[0]
    if isinstance(out, tuple):
        return features[0], features[1:]
    out.pooler_output = features[0]
    if len(features) > 1:
        out.deepstack_features = features[1:]
    return out


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_logits_are_those_of_loops(kind, monkeypatch):
    """Two videos of a row; the ends of the frames are windows of fewer patches."""
    model = test_windowed.make(kind)
    own, inputs = test_windowed.tower(model), tiny.batch(kind, [test_windowed.CLIPS])
    patches, options = inputs["pixel_values_videos"], ToMe(r=3)
    with torch.no_grad():
        whole = logits(model, inputs)
        with vidtok.attach(model, vision=options):
            got = logits(model, inputs)
        features, _ = test_windowed.by_loops(own, options, patches)
        plain = own(patches, inputs["video_grid_thw"])
        monkeypatch.setattr(own, "forward", lambda *args, **kwargs: _with(plain, features), raising=False)
        want = logits(model, inputs)
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert (got - whole).norm() > 1e-2 * want.norm()


# InternVL's tower of transformers 4 does not take output_hidden_states.
@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", *["internvl"][: tiny.VERSION[0] - 4]])
def test_states_that_are_read_are_full_and_those_of_loops(name):
    config = family(name).make("sdpa").config
    config.vision_config.num_hidden_layers = 4
    torch.manual_seed(3)
    model = sharpen(type(made(name)[0])(config))
    ((own, kind),) = towers.locate(model)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    first: list[torch.Tensor] = []

    def look(block, args, kwargs):
        first.append([*args, *kwargs.values()][0])

    handle = kind.find_blocks(own)[0].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        own(pixels)
        handle.remove()
        with vidtok.attach(model, vision="tome:r=3") as attached:
            states = own(pixels, output_hidden_states=True).hidden_states
            assert attached.vision[0].run.tokens[-1] < attached.vision[0].run.tokens[0]
        for i, image in enumerate(first[0]):
            given = loops.dense(kind.find_blocks(own), image, 3, kind.prefix(own))
            for state, want in zip(states[1:], given, strict=True):
                assert (state[i] - want).norm() <= 1e-5 * want.norm()


# ---------------------------------------------------------------------- together with the other hook points
ALL = {"vision": "tome:r=3", "visual": tiny.drop, "decoder": "uni_1_0.5"}


def everything(module):
    """The three hook points for a family of the zoo."""
    return {**ALL, "decoder": f"uni_{getattr(module, 'DROP_AT', 1)}_0.5"}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_all_three(name):
    module, (model, inputs) = family(name), made(name)
    whole = logits(model, inputs)
    parts = everything(module)
    with vidtok.attach(model, visual=parts["visual"], decoder=parts["decoder"]):
        without, _ = tiny.generate(model, inputs, 3)
    with vidtok.attach(model, **parts) as handle:
        got, out = tiny.generate(model, inputs, 3)
        report = handle.report()
        scale = got.abs().max()
        for i in range(len(module.ROWS)):
            one = module.row(inputs, module.ROWS, i)
            assert far(got[i : i + 1], uncached(model, one, out.sequences[i : i + 1, -3:])) < 2e-5 * scale
    assert far(got, without) > 1e-3 * scale
    assert torch.equal(logits(model, inputs), whole)
    (tower,) = report.vision
    blocks = tower.blocks
    assert blocks[0].tokens == tower.tokens and blocks[0].merged == blocks[1].tokens > blocks[1].merged
    assert len(report.samples) == sum(map(len, module.ROWS)) and report.samples[0].stages
    assert {"vision", "prefill"} <= set(report.times) and "vision tower" in str(report)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_training(name):
    module = family(name)
    model, (_, inputs) = module.make("sdpa").train(), made(name)
    inputs = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    results = []
    with vidtok.attach(model, **everything(module)):
        for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
            if options is not None:
                model.gradient_checkpointing_enable(options)
                # Reentrant checkpoints want an input with a gradient.
                model.enable_input_require_grads()
            model.zero_grad()
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            visual = [p.grad.clone() for n, p in model.named_parameters() if "visual" in n and p.grad is not None]
            results.append((loss.detach(), visual))
            model.gradient_checkpointing_disable()
    assert len(results[0][1]) > 10
    for loss, visual in results[1:]:
        assert torch.equal(loss, results[0][0])
        for a, b in zip(visual, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", ["vision", "visual"])
@pytest.mark.parametrize("last", [0, 1])
def test_two_attachments_in_any_order(first, last):
    model, inputs = made("qwen2_5_vl")
    whole = logits(model, inputs)
    with vidtok.attach(model, vision=ALL["vision"], visual=ALL["visual"]):
        want = logits(model, inputs)
    order = ["vision", "visual"] if first == "vision" else ["visual", "vision"]
    handles = [vidtok.attach(model, **{name: ALL[name]}) for name in order]
    assert torch.equal(logits(model, inputs), want)
    handles.pop(last).restore()
    alone = logits(model, inputs)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alone, want)
    handles.pop().restore()
    assert torch.equal(logits(model, inputs), whole)


def test_detach_finds_vision():
    model, inputs = made("qwen2_5_vl")
    whole = logits(model, inputs)
    for parts in ({"vision": ALL["vision"]}, ALL):
        handle = vidtok.attach(model, **parts)
        assert not torch.equal(logits(model, inputs), whole)
        assert vidtok.detach(model)
        assert not handle.active and not vidtok.detach(model)
        assert torch.equal(logits(model, inputs), whole)


def test_errors_leave_nothing():
    model, inputs = made("qwen2_5_vl")
    whole, kinds = logits(model, inputs), [type(m) for m in model.modules()]
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    for parts in ({"visual": "no such"}, {"decoder": "uni_99_0.5"}, {"position": "no such"}):
        with pytest.raises(ValueError, match=r"no such|99|layer"):
            vidtok.attach(model, **{**ALL, **parts})
        assert [type(m) for m in model.modules()] == kinds
        assert all(a is b for a, b in zip(configs, (m.config for m in model.modules() if hasattr(m, "config"))))
    with vidtok.attach(model, **ALL):
        want = logits(model, inputs)
        layer = model.model.language_model.layers[1]
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, inputs)
        hook.remove()
        assert torch.equal(logits(model, inputs), want)
    assert torch.equal(logits(model, inputs), whole)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.visual.modules() if m is not model)


def test_images_beside_videos():
    model = made("qwen2_5_vl")[0]
    inputs = tiny.batch("qwen2_5_vl", tiny.MIXED)
    with torch.no_grad(), vidtok.attach(model, **ALL):
        got = logits(model, inputs)
        for i in range(len(tiny.MIXED)):
            alone = logits(model, tiny.row(inputs, tiny.MIXED, i))
            assert far(got[i, -1], alone[0, -1]) < 2e-5 * got.abs().max()
