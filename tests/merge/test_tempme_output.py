"""Merging across frames: what leaves the tower, the trace, and frame positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPConfig, CLIPForImageClassification

import vidtok
from tests.merge.own_vit import Own
from tests.merge.tempme_models import SMALL, TOKENS, clip, close, frames, options, pixels, put
from tests.merge.videos import Mine, by_loops


# ------------------------------------------------------------------ what leaves the tower
def test_full_gives_each_token_its_copy():
    model, own = Own(), options(trace=True)
    outs = {}
    for output in ("frames", "video", "full"):
        with torch.no_grad(), put(model, dataclasses.replace(own, output=output)) as merging:
            outs[output] = model(frames(8))
            if output == "video":
                copies, plan = merging.unmerge(outs[output]), merging.trace()
    assert torch.equal(outs["full"], copies) and torch.equal(outs["full"][:, :1], outs["frames"])
    assert plan.num_sequences == 2 and plan.lengths_in() == [4 * TOKENS] * 2
    rows, offset = outs["video"].flatten(0, 1), plan.offset.tolist()
    flat = outs["full"].flatten(0, 1)
    seen = []
    for i, row in enumerate(rows):
        members = plan.member[offset[i] : offset[i + 1]].tolist()
        seen += members
        assert all(torch.equal(flat[member], row) for member in members)
    assert sorted(seen) == list(range(8 * TOKENS))


@pytest.mark.parametrize("counts", [[4, 4], [5, 3]])
def test_recorded_states_hold_every_frame(counts):
    model, own = clip(), options(output="full")
    with torch.no_grad(), vidtok.attach(model, vision=own) as handle, handle.vision[0].frames(counts):
        out = model(pixels(8), output_hidden_states=True)
    with torch.no_grad():
        plain = model(pixels(8), output_hidden_states=True)
    assert [tuple(x.shape) for x in out.hidden_states] == [(8, TOKENS, 32)] * 5
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    # Frame after frame its own: what entered the second block is near what enters it unmerged.
    near = [[(a - b).norm() for b in plain.hidden_states[1]] for a in out.hidden_states[1]]
    assert [min(range(8), key=row.__getitem__) for row in near] == list(range(8))


def test_joins_without_merges_only_move_tokens():
    own = options(r=0, cross=0.0, intra=0.0, output="full")
    with torch.no_grad(), put(Own(), own) as merging:
        out = merging.tower(frames(8))
        plan = merging.trace()
    assert plan.num_out == plan.num_in == 8 * TOKENS and out.shape == (8, TOKENS, 32)
    (want,) = (c for c in by_loops(Own().stages["blocks"], Mine(), frames(4), own))
    with torch.no_grad(), put(Own(), options(r=0, cross=0.0, intra=0.0)) as merging:
        assert close(merging.tower(frames(4))[:, 0], want.x[:4])
    # Patches lie behind the four class tokens, frame after frame.
    with torch.no_grad(), put(Own(), own) as merging:
        assert close(merging.tower(frames(4))[:, 1:].flatten(0, 1), want.x[4:])


def test_a_head_that_pools_patches_gets_those_of_each_frame():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "num_hidden_layers": 4}, text_config=text, num_labels=3)
    model = CLIPForImageClassification(config).eval()
    with torch.no_grad(), vidtok.attach(model, vision=SMALL) as handle:
        assert model(pixels(8)).logits.shape == (8, 3) and handle.vision[0].output == "full"


def test_the_trace_holds_the_sizes_across_joins():
    with torch.no_grad(), put(Own(), options(trace=True, merge_frames=(2, 3))) as merging, merging.frames([5, 3, 1]):
        merging.tower(frames(9))
        plan, size = merging.trace(), merging.size
        early = merging.trace(stop=1)
    members = plan.offset.diff().float().view(size.shape)
    torch.testing.assert_close(members, size.round(), rtol=0, atol=0)
    # The frame that each token comes from stays inside its video.
    owner = plan.member.long() // TOKENS
    video = torch.tensor([0] * 5 + [1] * 3 + [2])[owner]
    clip_ = plan._owner() // size.shape[1]
    assert torch.equal(video, torch.tensor([0] * 1 + [1] * 1 + [2])[clip_])
    assert early.num_in == 9 * TOKENS and early.num_sequences == 3


def test_class_tokens_stand_for_themselves():
    with torch.no_grad(), put(Own(), options(), protected=1) as merging:
        merging.tower(frames(4))
    assert torch.equal(merging.size[:, :4], torch.ones(1, 4))


def test_what_a_tower_without_class_tokens_cannot_give():
    with pytest.raises(ValueError, match="no class token"):
        put(Own(), options(output="frames"), protected=0)
    with put(Own(), options(), protected=0) as merging:
        assert merging.output == "video"


# ------------------------------------------------------------------ frame positions
def test_frame_positions_equal_loops_and_carry_gradients():
    model, own = Own(), options(output="video", frame_pos=True)
    with put(model, own) as merging:
        assert [tuple(p.shape) for p in merging.positions.parameters()] == [(4, 32), (2, 32)]
        with torch.no_grad():
            before = model(frames(8))
            for p in merging.positions.parameters():
                p.normal_(generator=torch.Generator().manual_seed(0))
        out = model(frames(8))
        want = [
            c.x for v in frames(8).chunk(2) for c in by_loops(model.stages["blocks"], Mine(), v, own, merging.positions)
        ]
        assert close(out, torch.stack(want)) and not torch.allclose(out, before)
        parameters = [*merging.positions.parameters(), *model.parameters()]
        got = torch.autograd.grad(out.square().mean(), parameters)
        loops = torch.autograd.grad(torch.stack(want).square().mean(), parameters)
    for a, b in zip(got, loops, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= 1e-4 * b.norm()


def test_frame_positions_of_a_clip_that_is_filled_up():
    model, own = Own(), options(output="video", merge_frames=(2, 3), intra=0.2, frame_pos=True, frames=5)
    with torch.no_grad(), put(model, own) as merging:
        for p in merging.positions.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
        with merging.frames(5):
            by_number = model(frames(10))
        with merging.frames([5, 5]):
            assert torch.equal(model(frames(10)), by_number)


def test_zero_frame_positions_change_no_bit():
    model = clip()
    with torch.no_grad():
        with vidtok.attach(model, vision=SMALL):
            want = model(pixels(4)).pooler_output
        with vidtok.attach(model, vision=SMALL + ",frame_pos=true"):
            assert torch.equal(model(pixels(4)).pooler_output, want)


def test_frame_positions_are_no_part_of_the_model():
    model = clip()
    keys = list(model.state_dict())
    with vidtok.attach(model, vision=SMALL + ",frame_pos=true") as handle:
        positions = handle.vision[0].positions
        assert list(model.state_dict()) == keys and len(list(model.parameters())) == len(keys)
        optimizer = torch.optim.SGD([*model.parameters(), *positions.parameters()], lr=0.1)
        model(pixels(4)).pooler_output.square().mean().backward()
        optimizer.step()
        saved = positions.state_dict()
    assert list(saved) == ["levels.0", "levels.1"] and all(value.norm() > 0 for value in saved.values())
    with vidtok.attach(model, vision=SMALL + ",frame_pos=true") as handle:
        handle.vision[0].positions.load_state_dict(saved)
        assert torch.equal(handle.vision[0].positions.levels[0], saved["levels.0"])


def test_frame_positions_for_more_clips_than_there_are():
    message = "at most 4 clips before block 1, as frame positions have, got 6"
    with put(Own(), options(frame_pos=True)) as merging, merging.frames(6), pytest.raises(ValueError, match=message):
        merging.tower(frames(6))
