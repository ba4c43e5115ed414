"""Merging in the retrieval model: each way in which an earlier implementation went wrong is tried."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.systems.stop.reference import clips, make
from vidtok import ops
from vidtok.merge import ToMe
from vidtok.merge.run import Run
from vidtok.systems.stop import PRESETS, CLIP4Clip, Sizes, apply_tome_patch, left, tiny

PROMPTS = ["none", "DGL", "group2-2"]
BASE = Sizes(vision_width=48, vision_heads=4, text_width=32, text_heads=4, text_layers=1, vocabulary=64, embed=16)


def test_the_documented_default_runs():
    # 652 tokens with 2 merged in the whole sequence would leave frames of unequal length.
    model = CLIP4Clip(None, BASE, SimpleNamespace(**PRESETS["training"], temporal_prompt="DGL")).eval()
    with torch.no_grad():
        assert torch.isfinite(model.encode_video(torch.randn(1, 12, 3, 224, 224))).all()
    assert model.run.tokens[:12] == [50, *range(48, 26, -2)]


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_nothing_is_left_over_from_the_pass_before(prompt):
    model = make(prompt)
    model.set_tome(4)
    with torch.no_grad():
        want = [model.encode_video(clips(batch, frames)) for batch, frames in ((2, 3), (1, 5))]
        for _ in range(2):
            got = [model.encode_video(clips(batch, frames)) for batch, frames in ((2, 3), (1, 5))]
            assert all(torch.equal(a, b) for a, b in zip(got, want))
        with pytest.raises(ValueError):
            model.encode_video(torch.zeros(1, 2, 3, 8, 8))
        assert torch.equal(model.encode_video(clips(2, 3)), want[0])


def test_sizes_that_were_kept_would_show(monkeypatch):
    model = make()
    model.set_tome(4)
    with torch.no_grad():
        want = model.encode_video(clips())
        real = Run.__init__

        def stale(self, *args):
            real(self, *args)
            self.size[0] = torch.arange(1.0, 18.0).expand(6, -1).contiguous()

        monkeypatch.setattr(Run, "__init__", stale)
        assert (model.encode_video(clips()) - want).norm() > 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_videos_do_not_mix(prompt):
    model = make(prompt)
    model.set_tome(4)
    with torch.no_grad():
        both, one = model.encode_video(clips(2)), model.encode_video(clips(2)[:1])
        other = clips(2)
        other[1] = 9 * torch.rand_like(other[1])
        torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.encode_video(other)[:1], one, rtol=1e-4, atol=1e-5)


def test_frames_do_not_mix(monkeypatch):
    seen = []
    real = ops.bipartite_merge

    def watch(x, metric, r, **options):
        seen.append((tuple(x.shape), options["protected"]))
        return real(x, metric, r, **options)

    model = make(tome_trace_source=True, tome_r=4)
    monkeypatch.setattr(ops, "bipartite_merge", watch)
    with torch.no_grad():
        model.encode_video(clips(2, 3))
    # Frame by frame: class tokens are protected, prompts are not among what merges.
    assert seen == [((6, 17, 64 // 2), 1), ((6, 13, 64 // 2), 1)]
    plan = model.run.plan()
    frame = torch.repeat_interleave(torch.arange(6), plan.offset[9::9].diff(prepend=torch.zeros(1)).long())
    assert torch.equal(plan.member.long() // 17, frame)
    classes = plan.anchor.view(6, 9)[:, 0]
    assert torch.equal(classes.long(), torch.arange(6) * 17) and (model.run.size[2].view(6, 9)[:, 0] == 1).all()


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_prop_attn_is_used(prompt):
    model, video = make(prompt), clips()
    with torch.no_grad():
        outs = [model.set_tome(4, prop_attn=flag) or model.encode_video(video) for flag in (True, False)]
    assert (outs[0] - outs[1]).norm() > 1e-3


def test_the_metric_is_the_keys():
    model, video = make(), clips()
    outs = []
    with torch.no_grad():
        for metric in ("keys", "values", "hidden"):
            model.config.tome_metric = metric
            model.set_tome(4)
            outs.append(model.encode_video(video))
    assert (outs[0] - outs[1]).norm() > 1e-4 and (outs[0] - outs[2]).norm() > 1e-4


def test_r_is_clamped_with_a_notice():
    with pytest.warns(UserWarning, match="42, 34, 26, 18, 10, 6, 4, 3, 2, 2, 2, 2") as caught:
        model = CLIP4Clip(None, BASE, {"tome_r": 8, "temporal_prompt": "DGL"}).eval()
    assert "tome_r=8 asks for more merges than the 50 tokens of a frame allow: from layer 5 on" in str(
        caught[0].message
    )
    with torch.no_grad():
        assert torch.isfinite(model.encode_video(torch.randn(1, 2, 3, 224, 224))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_tome(2)
        model.set_tome(4)
    assert left(ToMe(r=2), Sizes())[-2:] == [28, 28] and left(ToMe(r=4), Sizes())[-1] == 6


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.filterwarnings("ignore:tome_r")
def test_presets(name):
    assert (
        PRESETS[name]
        == {
            "training": {"tome_r": 2, "max_frames": 12},
            "inference": {"tome_r": 4, "max_frames": 12},
            "prototyping": {"tome_r": 8, "max_frames": 8},
        }[name]
    )
    model = tiny(temporal_prompt="DGL", **PRESETS[name])
    assert model.tome.r == PRESETS[name]["tome_r"]


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_zero_merges_nothing(prompt):
    model, video = make(prompt), clips()
    with torch.no_grad():
        want = model.encode_video(video)
        apply_tome_patch(model, tome_r=4)
        assert not torch.equal(model.encode_video(video), want)
        apply_tome_patch(model, tome_r=0)
        assert torch.equal(model.encode_video(video), want)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_where_every_patch_went(prompt):
    model = make(prompt)
    model.set_tome(4, trace_source=True)
    with torch.no_grad():
        model.encode_video(clips(2, 3))
    source = model.source_map()
    assert source.shape == (6, 17)
    size = model.run.size[2]
    for frame in range(6):
        count = torch.bincount(source[frame], minlength=9)
        assert torch.equal(count.float(), size[frame])
        assert source[frame, 0] == 0
    # Patches that look alike go together.
    model.set_tome([6, 0, 0], trace_source=True)
    halves = torch.zeros(1, 1, 3, 32, 32)
    halves[..., :16], halves[..., 16:] = torch.randn(3, 1, 1), torch.randn(3, 1, 1)
    with torch.no_grad():
        model.clip.visual.positional_embedding.zero_()
        model.encode_video(halves)
    source = model.source_map()[0, 1:].view(4, 4)
    assert source.unique().numel() == 10 and not set(source[:, :2].flatten().tolist()) & set(
        source[:, 2:].flatten().tolist()
    )
    model.set_tome(4)
    with pytest.raises(ValueError, match="expected tome_trace_source=True"):
        model.source_map()


@pytest.mark.parametrize(("prompt", "frames"), [("none", 1), ("none", 7), ("DGL", 5), ("group2-2", 3)])
def test_joining_frames(prompt, frames):
    model = make(
        prompt, layers=4, tome_r=2, tome_frame_merging=True, tome_merge_layers="1-3", tome_merge_frame_nums="2-3",
        tome_trace_source=True,
    )  # fmt: skip
    video = clips(2, frames)
    with torch.no_grad():
        out = model.encode_video(video)
        torch.testing.assert_close(model.encode_video(video[:1]), out[:1], rtol=1e-4, atol=1e-5)
        assert torch.isfinite(out).all()
        assert model.source_map().shape == (frames, 17)
        with pytest.warns(UserWarning, match="tome_frame_merging does nothing with tome_r=0"):
            apply_tome_patch(model, tome_r=0)
        assert model.tome is None
        model.config.tome_frame_merging = False
        model.set_tome(2)
        assert not torch.allclose(model.encode_video(video), out, atol=1e-4)


def test_training_with_merging():
    model = tiny(32, 8, 32, temporal_prompt="DGL", tome_r=3, layers=2, text_layers=1, seed=0)
    ids = torch.randint(1, 500, (4, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 511
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 0.3, 0.0))
    losses = []
    for _ in range(8):
        loss = model(ids, None, None, clips(4), torch.ones(4, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_wrapper_is_looked_through():
    model = tiny()
    wrapped = SimpleNamespace(module=model)
    assert apply_tome_patch(wrapped, tome_r=2, trace_source=True, prop_attn=False) is wrapped
    assert model.tome == ToMe(r=2, trace=True, prop_attn=False)
    assert apply_tome_patch(model).tome.r == 2
    with pytest.raises(TypeError, match=r"expected a vidtok.systems.stop.CLIP4Clip, got Linear"):
        apply_tome_patch(torch.nn.Linear(1, 1), 2)


def test_the_names_of_the_published_code(monkeypatch):
    folder = Path(__file__).parents[3] / "examples" / "stop"
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if re.fullmatch(r"modules(\..*)?", name)]:
        monkeypatch.delitem(sys.modules, name)
    from modules.clip4clip import CLIP4Clip as Theirs
    from modules.tome_patch import apply_tome_patch as patch

    assert Theirs is CLIP4Clip and patch is apply_tome_patch
    task_config = SimpleNamespace(temporal_prompt="DGL")
    task_config.tome_r = 2
    task_config.tome_trace_source = False
    task_config.tome_prop_attn = True
    model = Theirs(None, tiny(temporal_prompt="none", heads=1, text_heads=1).clip.state_dict(), task_config)
    assert model.tome == ToMe(r=2) and model.task_config is task_config


def test_one_graph():
    model, video = make(layers=3), clips()
    model.set_tome(4)
    with torch.no_grad():
        want = model.encode_video(video)
        compiled = torch.compile(model.encode_video, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(video), want)
        torch.testing.assert_close(compiled(clips(1, 5)), model.encode_video(clips(1, 5)))
