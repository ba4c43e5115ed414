"""Qwen's towers with tokens that merge inside windows and frames, against loops."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

import vidtok
from tests.models import flash, tiny
from tests.models.towers import loops
from tests.models.zoo._common import sharpen
from vidtok.merge import ToMe, packed

# Two videos: frames of 8×8 patches in four windows, and of 6×6, whose windows at the edges are smaller.
CLIPS = [("video", 4, 112), ("video", 3, 84)]
_made: dict[tuple[str, str], object] = {}


def make(kind: str, attention: str = "sdpa"):
    """A model whose tower has four blocks; Qwen2.5-VL's second and fourth attend to whole frames."""
    if (kind, attention) not in _made:
        config = tiny.make(kind, attention, layers=1).config
        config.vision_config.depth = 4
        config.vision_config.fullatt_block_indexes = [1, 3]
        config.vision_config.deepstack_visual_indexes = [0, 2]
        config._attn_implementation = attention
        torch.manual_seed(1)
        kinds = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
        model = getattr(__import__("transformers"), f"{kinds[kind]}ForConditionalGeneration")(config)
        _made[kind, attention] = sharpen(model)
    return _made[kind, attention]


def tower(model):
    return model.model.visual


def inputs() -> tuple[Tensor, Tensor]:
    parts = [tiny.patchify(tiny.frames(count, side, 5 * i)) for i, (_, count, side) in enumerate(CLIPS)]
    return torch.cat([p for p, _ in parts]), torch.tensor([grid for _, grid in parts])


def outputs(own, *args) -> list[Tensor]:
    """Features after the patch merger, then those of the deepstack mergers."""
    out = own(*args)
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, tuple):
        return [out[0], *out[1]]
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


def first(own, *args) -> Tensor:
    """What the first block gets, patches in the order of the processor."""
    seen = []
    where = own.patch_embed if hasattr(own, "window_size") else own.blocks[0]
    if where is own.patch_embed:
        handle = where.register_forward_hook(lambda m, a, out: seen.append(out))
    else:
        handle = where.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    own(*args)
    handle.remove()
    return seen[0]


def by_loops(own, options: ToMe, pixels: Tensor | None = None) -> tuple[list[Tensor], list[int]]:
    """The same as :func:`outputs`, and the sizes of the tokens that are left, in no order."""
    given_pixels, grid = inputs()
    pixels = given_pixels if pixels is None else pixels

    def counts(layer: int, length: int) -> int:
        return options.schedule.counts(len(own.blocks), length)[layer]

    x = first(own, pixels, grid)
    given, frames = loops.run(own, x, grid.tolist(), counts, options.prop_attn, options.metric)
    out = [own.merger(given[-1])]
    for merger, layer in zip(
        getattr(own, "deepstack_merger_list", ()), getattr(own, "deepstack_visual_indexes", ()), strict=True
    ):
        out.append(merger(given[layer]))
    return out, [len(token.places) for frame in frames for window in frame for token in window]


def close(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative difference."""
    assert len(got) == len(want)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


OPTIONS = [
    {"r": 2},
    {"r": [3, 0, 5, 1]},
    {"r": (2, -1), "form": "channel"},
    {"ratio": 0.4},
    {"k": 3},
    {"r": 2, "prop_attn": False},
    {"r": 3, "metric": "values"},
    {"r": 3, "metric": "hidden"},
    {"r": 100},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_equals_loops(kind, options):
    own, options = tower(make(kind)), ToMe(**options)
    with torch.no_grad():
        want, sizes = by_loops(own, options)
        with vidtok.attach(own, vision=options) as handle:
            got = outputs(own, *inputs())
            left = handle.vision[0].size
    assert close(got, want) <= 1e-5
    assert sorted(left.tolist()) == sorted(sizes)
    assert sum(sizes) == len(inputs()[0])


@pytest.mark.parametrize("form", ["auto", "mask", "channel"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_eager_equals_loops(kind, form):
    own = tower(make(kind, "eager"))
    with torch.no_grad():
        want, _ = by_loops(own, ToMe(r=3))
        with vidtok.attach(own, vision=ToMe(r=3, form=form)):
            assert close(outputs(own, *inputs()), want) <= 1e-5


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_flash_equals_loops(kind):
    with flash.installed() as calls, torch.no_grad():
        model = make(kind)
        own = tower(model)
        want, _ = by_loops(own, ToMe(r=3))
        before = outputs(own, *inputs())
        own.set_attn_implementation("flash_attention_2")
        try:
            calls.clear()
            with vidtok.attach(own, vision="tome:r=0"):
                assert close(outputs(own, *inputs()), before) <= 1e-5
            with vidtok.attach(own, vision="tome:r=3"):
                got = outputs(own, *inputs())
            made = list(calls)
        finally:
            own.set_attn_implementation("sdpa")
    # One call for all windows or frames of a block.
    assert [name for name, _, _ in made] == ["varlen"] * 2 * len(own.blocks)
    windows = 2 * 4 + 2 * 4 if kind == "qwen2_5_vl" else 4
    assert [n for _, n, _ in made] == ([windows, 4, windows, 4] if kind == "qwen2_5_vl" else [4] * 4) * 2
    assert close(got, want) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_no_merges_change_no_bit(kind, attention):
    own = tower(make(kind, attention))
    with torch.no_grad():
        want = outputs(own, *inputs())
        with vidtok.attach(own, vision="tome:r=0"):
            got = outputs(own, *inputs())
        after = outputs(own, *inputs())
    for a, b, c in zip(want, got, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def _unturned(self, index, kwargs):
    whole = {name: kwargs[name] for name in packed._POSITIONS if kwargs.get(name) is not None}
    out = _arguments(self, index, kwargs)
    for name, value in whole.items():
        n = self.tokens[index]
        out[name] = value[:n] if isinstance(value, Tensor) else tuple(part[:n] for part in value)
    return out


def _shifted(self, index, cu_seqlens):
    return [border * self.tokens[index] // self.tokens[0] for border in cu_seqlens.tolist()]


_arguments = packed.PackedRun.arguments


@pytest.mark.parametrize("taken", ["rotary", "borders", "sizes", "deepstack"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_holds_it_up(kind, taken, monkeypatch):
    """Without each part of it the result is another."""
    own = tower(make(kind))
    with torch.no_grad():
        want, _ = by_loops(own, ToMe(r=3))
        if taken == "rotary":
            monkeypatch.setattr(packed.PackedRun, "arguments", _unturned)
        elif taken == "borders":
            monkeypatch.setattr(packed.PackedRun, "_borders", _shifted)
        elif taken == "sizes":
            monkeypatch.setattr(packed.PackedStep, "size", None)
        elif kind == "qwen3_vl":
            monkeypatch.setattr("vidtok.models.towers._full._full", lambda merging, index, x: x)
        else:
            return
        with vidtok.attach(own, vision="tome:r=3"):
            got = outputs(own, *inputs())
    if taken == "deepstack":
        assert [len(x) for x in got] != [len(x) for x in want]
    else:
        assert close(got, want) > 1e-2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_videos_do_not_meet(kind):
    own, (pixels, grid) = tower(make(kind)), inputs()
    cut = int(grid[0].prod())
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=3"):
        both = outputs(own, pixels, grid)
        one, two = outputs(own, pixels[:cut], grid[:1]), outputs(own, pixels[cut:], grid[1:])
    for x, a, b in zip(both, one, two, strict=True):
        torch.testing.assert_close(x, torch.cat([a, b]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_left_can_be_read(kind):
    own, (pixels, grid) = tower(make(kind)), inputs()
    with torch.no_grad(), vidtok.attach(own, vision="tome:ratio=0.5") as handle:
        outputs(own, pixels, grid)
        merging = handle.vision[0]
        plan, size, tokens = merging.trace(), merging.size, merging.run.tokens
        assert merging.trace(1).num_out == tokens[1]
        marks = torch.arange(plan.num_out)[:, None].float()
        spread = merging.unmerge(marks)[:, 0]
    plan.validate(ordered=False)
    assert tokens[0] == plan.num_in == len(pixels) and tokens[-1] == plan.num_out == len(pixels) // 2
    assert torch.equal(plan.offset.diff().float(), size)
    # Who merges lies in one window.
    where = torch.repeat_interleave(torch.arange(plan.num_sequences), plan.cu_seqlens_in.diff().long())
    out = torch.repeat_interleave(torch.arange(plan.num_sequences), plan.cu_seqlens_out.diff().long())
    assert torch.equal(out[spread.long()], where)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_checkpointing_changes_no_gradient(kind, reentrant):
    own = copy.deepcopy(tower(make(kind))).train()
    own.gradient_checkpointing_enable({"use_reentrant": reentrant})
    pixels, grid = inputs()
    grads = []
    with vidtok.attach(own, vision="tome:r=3"):
        for _ in range(2):
            own.zero_grad()
            x = pixels.clone().requires_grad_()
            # Another pass in between: the recomputation meets the run that it belongs to.
            loss = sum(out.square().mean() for out in outputs(own, x, grid))
            with torch.no_grad():
                outputs(own, pixels[:64], torch.tensor([[1, 8, 8]]))
            loss.backward()
            grads.append([p.grad.clone() for p in own.parameters() if p.grad is not None])
            own.gradient_checkpointing_disable()
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_equal_those_of_loops(kind):
    own, (pixels, grid) = tower(make(kind)), inputs()
    pixels.requires_grad_()
    inside = [pixels, own.blocks[0].attn.qkv.weight, own.blocks[2].mlp.parameters().__next__()]
    want = torch.autograd.grad(sum(out.square().mean() for out in by_loops(own, ToMe(r=3), pixels)[0]), inside)
    with vidtok.attach(own, vision="tome:r=3"):
        got = torch.autograd.grad(sum(out.square().mean() for out in outputs(own, pixels, grid)), inside)
    assert close(list(got), list(want)) <= 1e-4


def test_copies_and_pickles_are_plain():
    own = tower(make("qwen3_vl"))
    with torch.no_grad():
        want = outputs(own, *inputs())
        with vidtok.attach(own, vision="tome:r=3"):
            file = io.BytesIO()
            torch.save(own, file)
            file.seek(0)
            for other in (copy.deepcopy(own), torch.load(file, weights_only=False)):
                for a, b in zip(outputs(other, *inputs()), want, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_failed_call_leaves_nothing_behind(kind):
    own, (pixels, grid) = tower(make(kind)), inputs()
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=3"):
        want = outputs(own, pixels, grid)
        handle = own.blocks[2].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            own(pixels, grid)
        handle.remove()
        small = outputs(own, pixels[:16], torch.tensor([[1, 4, 4]]))
        again = outputs(own, pixels, grid)
    assert small[0].shape[0] == 4
    for a, b in zip(again, want, strict=True):
        assert torch.equal(a, b)


def test_half_precision():
    own = tower(make("qwen2_vl"))
    pixels, grid = inputs()
    with torch.no_grad():
        with vidtok.attach(own, vision="tome:r=3"):
            want = outputs(own, pixels, grid)
            with torch.autocast("cpu", torch.bfloat16):
                assert close([x.float() for x in outputs(own, pixels, grid)], want) < 0.05
        half = copy.deepcopy(own).bfloat16()
        for form in ("mask", "channel"):
            with vidtok.attach(half, vision=f"tome:r=3,form={form}"):
                assert close([x.float() for x in outputs(half, pixels.bfloat16(), grid)], want) < 0.05


@pytest.mark.slow
def test_compiled():
    own = tower(make("qwen2_5_vl"))
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=3"):
        want = outputs(own, *inputs())
        got = outputs(torch.compile(own, backend="eager"), *inputs())
    assert close(got, want) <= 1e-6


def test_recorded_states_are_full():
    if tiny.VERSION[0] < 5:
        return
    own, (pixels, grid) = tower(make("qwen2_vl")), inputs()
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=3"):
        states = own(pixels, grid, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert {len(x) for x in states} == {len(pixels)}


def test_refused():
    own = tower(make("qwen2_5_vl"))
    for name in ("qwen2_vl", "qwen2_5_vl"):
        packed = tower(make(name))
        with pytest.raises(
            ValueError, match=r"number of tokens in front of each window or frame of Qwen2.* got a mask"
        ):
            vidtok.attach(packed, vision=ToMe(r=2, protected=torch.zeros(3, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"for 'tempme', got Qwen2.*, whose sequences lie behind one another"):
            vidtok.attach(packed, vision="tempme:frames=2,merge_layers=[1,2],merge_frames=[2,2]")
    with pytest.raises(ValueError, match="4 layers, got 3"):
        vidtok.attach(own, vision=ToMe(r=[1, 2, 3]))
    other = copy.deepcopy(own)
    other.fullatt_block_indexes = [0, 2]
    with pytest.raises(ValueError, match="windows in its first block"):
        vidtok.attach(other, vision="tome:r=2")
    with vidtok.attach(own, vision="tome:r=2"), pytest.raises(ValueError, match="restore"):
        vidtok.attach(own, vision="tome:r=2")


def test_protected_tokens_of_a_window_stay():
    own, (pixels, grid) = tower(make("qwen2_vl")), inputs()
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=100,protected=4") as handle:
        own(pixels, grid)
        size, plan = handle.vision[0].size, handle.vision[0].trace()
    for start in plan.cu_seqlens_out[:-1].tolist():
        assert torch.equal(size[start : start + 4], torch.ones(4))
