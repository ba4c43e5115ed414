"""Merging across frames: published token counts, loops, videos of any length, options."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import vidtok
from tests.merge.own_vit import Own, attend, feed
from tests.merge.tempme_models import SMALL, TOKENS, clip, close, frames, options, pixels, put, sharp, tower
from tests.merge.videos import Clips, Mine, by_loops
from vidtok.merge import TempMe, attach_any, spec

B32 = [48, 46, 44, 42, 40, 38, 36, 34, 44, 56, 107, 97]


# ------------------------------------------------------------------ counts
def test_published_counts_of_vit_b32():
    levels = TempMe().levels(12, 12, 50, 1)
    assert [level.tokens_out for level in levels] == B32
    assert [(v.clips_out, v.attended, v.cross, v.intra) for v in levels[8:]] == [
        (6, 48, 20, 4), (3, 62, 26, 6), (1, 118, 50, 11), (1, 107, 0, 10),
    ]  # fmt: skip
    assert [level.clips_out for level in levels[:8]] == [12] * 8


@pytest.mark.parametrize(("cross", "intra", "left"), [(0.4, 0.2, 127), (0.3, 0.1, 321)])
def test_published_counts_of_vit_b16(cross, intra, left):
    last = TempMe(r=10, cross=cross, intra=intra).levels(12, 12, 197, 1)[-1]
    assert (last.clips_out, last.tokens_out) == (1, left)


def test_a_tower_of_that_shape_has_these_counts():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=1, image_size=224, patch_size=32
    )
    model = CLIPVisionModel(config).eval()
    with torch.no_grad(), vidtok.attach(model, vision="tempme") as handle:
        out = model(torch.randn(24, 3, 224, 224))
    merging = handle.vision[0]
    assert merging.run.tokens == [50, *B32]
    assert merging.size.shape == (2, 97) and torch.equal(merging.size.sum(1), torch.full((2,), 600.0))
    assert out.pooler_output.shape == (24, 8) and out.last_hidden_state.shape == (24, 1, 8)


def test_a_schedule_that_collapses_stops_at_the_class_tokens():
    levels = TempMe(r=8).levels(12, 12, 50, 1)
    assert [level.tokens_out for level in levels[:8]] == [42, 34, 26, 18, 10, 6, 4, 3]
    assert levels[-1].tokens_out > 12


# ------------------------------------------------------------------ loops
@pytest.mark.parametrize("changed", [{}, {"prop_attn": False}, {"form": "channel"}, {"cross": 0.0}, {"intra": 0.0}])
@pytest.mark.parametrize("count", [4, 5])
def test_equals_loops(changed, count):
    model, own = Own(), options(output="video", **changed)
    x = torch.cat([frames(count), frames(count).flip(-1)])
    with torch.no_grad(), put(model, own) as merging, merging.frames(count):
        out = model(x)
        want = [c for video in x.chunk(2) for c in by_loops(model.stages["blocks"], Mine(), video, own)]
    assert len(out) == len(want)
    for got, size, clip_ in zip(out, merging.size, want, strict=True):
        torch.testing.assert_close(size, clip_.size, rtol=0, atol=0)
        assert close(got, clip_.x)


def test_clip_equals_loops():
    model, own = clip(), options(merge_frames=(2, 3))
    with torch.no_grad(), vidtok.attach(model, vision=own) as handle, handle.vision[0].frames(6):
        out = model(pixels(6)).last_hidden_state
        x = tower(model).pre_layrnorm(tower(model).embeddings(pixels(6)))
        (want,) = by_loops(tower(model).encoder.layers, Clips(4), x, own)
    assert out.shape == (6, 1, 32) and close(out[:, 0], want.x[:6])
    torch.testing.assert_close(handle.vision[0].size[0], want.size, rtol=0, atol=0)


def test_a_tower_without_class_token_gives_videos():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    model, own = sharp(SiglipVisionModel(config), 4.0, 1.5), options()
    with torch.no_grad(), vidtok.attach(model, vision=own) as handle:
        out = model(pixels(4))
        hidden = by_loops(tower(model).encoder.layers, Clips(4, 0), tower(model).embeddings(pixels(4)), own)[0]
        want = tower(model).post_layernorm(hidden.x)
    assert handle.vision[0].output == "video"
    assert out.last_hidden_state.shape == (1, len(want), 32) and close(out.last_hidden_state[0], want)
    # The head pools the video, each token as often as the frame tokens in it.
    head = tower(model).head
    many = want.repeat_interleave(hidden.size.int(), 0)
    with torch.no_grad():
        assert close(out.pooler_output, head(many[None]))


def test_frames_before_the_join_are_those_of_tome():
    model = Own()
    with torch.no_grad():
        with put(model, options(merge_layers=(3,), merge_frames=(1,), intra=0.0)):
            got = model(frames(4))
        with put(model, vidtok.merge.ToMe(r=[2, 2, 2, 0])):
            want = model(frames(4))
    assert torch.equal(got, want[:, :1])


# ------------------------------------------------------------------ videos of any length
@pytest.mark.parametrize("count", range(1, 9))
def test_every_number_of_frames(count):
    model, own = Own(), options(output="video", merge_frames=(2, 3))
    with torch.no_grad(), put(model, own) as merging, merging.frames(count):
        out = model(frames(count))
        want = by_loops(model.stages["blocks"], Mine(), frames(count), own)
    assert all(close(got, each.x) for got, each in zip(out, want, strict=True))
    assert float(merging.size.sum()) == count * TOKENS


@pytest.mark.parametrize("output", ["frames", "video", "full"])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_videos_of_different_lengths_in_one_batch(output, prop_attn):
    model, counts = Own(), [3, 8, 1, 5]
    videos = [frames(n) + 0.1 * i for i, n in enumerate(counts)]
    own = options(output=output, prop_attn=prop_attn, merge_frames=(2, 3), frame_pos=True, frames=8)
    with torch.no_grad(), put(model, own) as merging:
        for p in merging.positions.parameters():
            p.normal_()
        with merging.frames(counts):
            together = model(torch.cat(videos))
        # With one clip for the longest the groups are the same alone, if not with fewer clips than M.
        for n, video, got in zip(counts, videos, together.split(counts) if output != "video" else [], strict=False):
            with merging.frames([n, 8]):
                alone = model(torch.cat([video, videos[1]]))[:n]
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
    assert together.isfinite().all()
    assert together.shape == {"frames": (17, 1, 32), "full": (17, TOKENS, 32), "video": together.shape}[output]


def test_what_fills_a_clip_up_is_read_by_nothing(monkeypatch):
    from vidtok.merge import clips

    def outputs():
        with torch.no_grad(), put(Own(), options(prop_attn=False)) as merging, merging.frames(5):
            return merging, merging.tower(frames(5))

    _, want = outputs()
    monkeypatch.setattr(clips, "FILL", 1.0)
    merging, other = outputs()
    assert not torch.allclose(want, other) and merging.size.sum() > 5 * TOKENS


def test_a_batch_that_is_no_whole_videos():
    with put(Own(), options()) as merging:
        with pytest.raises(ValueError, match=r"whole videos of 4 frames .* got 6 rows"):
            merging.tower(frames(6))
        with merging.frames([2, 5]), pytest.raises(ValueError, match=r"a batch of 7 frames .* got 6 rows"):
            merging.tower(frames(6))
        for wrong in (0, [], [2, 0], [2, True]):
            with pytest.raises(ValueError, match="frames of at least 1"), merging.frames(wrong):
                pass
        assert merging.tower(frames(4)).shape == (4, 1, 32)


# ------------------------------------------------------------------ options
def test_a_spec_says_what_the_options_say():
    own = TempMe(frames=8, r=[4, 2], merge_layers=[2, 3], merge_frames=[2, 4], cross=0.4, frame_pos=True, trace=True)
    assert spec.parse(str(own)) == own and str(TempMe()) == "tempme"
    assert (
        str(own) == "tempme:frames=8,r=[4,2],merge_layers=[2,3],merge_frames=[2,4],cross=0.4,frame_pos=true,trace=true"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"frames": 0}, "frames as an integer of at least 1"),
        ({"frames": True}, "True"),
        ({"r": -1}, "-1"),
        ({"merge_layers": ()}, "merge_layers as a list"),
        ({"merge_layers": (2, 2)}, "ascending"),
        ({"merge_layers": (1, 2.0)}, "integers"),
        ({"merge_frames": (2,)}, "merge_frames with 2 numbers"),
        ({"merge_frames": (2, 0)}, "at least 1"),
        ({"cross": 1.5}, "cross from 0 to 1"),
        ({"intra": -0.1}, "intra from 0 to 1"),
        ({"output": "frame"}, "output as one of"),
        ({"metric": "queries"}, "metric as one of"),
        ({"frame_pos": 1}, "frame_pos as True or False"),
        ({"protected": -1}, "protected"),
        ({"protected": torch.zeros(9, 9, dtype=torch.bool)}, r"\(a mask is for tome alone\), got torch.bool \[9, 9\]"),
    ],
)
def test_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        options(**changed)


def test_layers_that_the_tower_does_not_have():
    model = clip()
    with pytest.raises(ValueError, match=r"merge_layers below the 4 layers of the tower, got \[8, 9, 10\]"):
        vidtok.attach(model, vision="tempme")
    with pytest.raises(ValueError, match="each of the 1 layers, got 2"):
        vidtok.attach(model, vision=options(r=[2, 2]))
    with vidtok.attach(model, vision=SMALL):
        assert model(pixels(4)).pooler_output.shape == (4, 32)


def test_arguments_that_do_not_join_are_refused():
    model = Own()

    def shifted(block, x, step, shift):
        return attend(block, x, step) + shift

    with (
        attach_any(model, options(), blocks="stages.blocks", halves=(shifted, feed)),
        pytest.raises(ValueError, match="their tokens only"),
    ):
        model.stages["blocks"][0](frames(4), torch.ones(4, TOKENS, 1))
