"""CLIP4Clip's interface, pooling, loss and settings."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from tests.systems.stop.reference import clips, make
from vidtok.systems.stop import CLIP4Clip, Config, Sizes, symmetric_cross_entropy, tiny


def captions(batch: int = 2) -> Tensor:
    ids = torch.randint(1, 500, (batch, 9), generator=torch.Generator().manual_seed(4))
    ids[:, 6] = 511
    return ids


def test_mean_of_normalised_frames_under_the_mask():
    model, video = make("none"), clips(2, 4)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    with torch.no_grad():
        got = model.encode_video(video, mask)
        frames = model.clip.encode_image(video.flatten(0, 1)).view(2, 4, -1)
        for row in range(2):
            own = [f / f.norm() for f, real in zip(frames[row], mask[row]) if real]
            want = sum(own) / len(own)
            torch.testing.assert_close(got[row], want / want.norm(), rtol=1e-5, atol=1e-6)
        # A video without a frame that counts is no NaN.
        assert torch.isfinite(model.encode_video(video, 0 * mask)).all()
        assert not torch.allclose(model.encode_video(video), got)
        with pytest.raises(ValueError, match=r"expected video_mask of shape \[2, 4\], got \[2, 3\]"):
            model.encode_video(video, torch.ones(2, 3))


@pytest.mark.parametrize("prompt", ["none", "DGL"])
def test_loss_is_that_of_the_formula(prompt):
    model = make(prompt).train()
    ids, video, mask = captions(3), clips(3), torch.ones(3, 3)
    loss = model(ids, None, None, video, mask)
    text, seen = model.encode_text(ids), model.encode_video(video, mask)
    logits = model.clip.logit_scale.exp() * text @ seen.t()
    rows = -logits.log_softmax(1).diagonal().mean()
    columns = -logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(loss, (rows + columns) / 2)
    loss.backward()
    assert model.clip.token_embedding.weight.grad.any()
    model.eval()
    assert model(ids, None, None, video, mask) is None
    with pytest.raises(ValueError, match="expected as many videos as the 3 captions, got 2"):
        model.train()(ids, None, None, video[:2], mask[:2])


def test_shapes_that_users_of_clip4clip_know():
    model, ids, video, mask = make("none"), captions(), clips(), torch.ones(2, 3)
    with torch.no_grad():
        sequence, visual = model.get_sequence_visual_output(
            ids[:, None], torch.zeros_like(ids)[:, None], torch.ones_like(ids)[:, None], video[:, None, :, None], mask
        )
        assert sequence.shape == (2, 1, 32) and visual.shape == (2, 3, 32)
        logits, rest = model.get_similarity_logits(sequence, visual, None, mask[:, None], loose_type=True)
        assert rest == ()
        want = 1 / 0.07 * model.encode_text(ids) @ model.encode_video(video, mask).t()
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
        shaped = model.get_visual_output(video.flatten(0, 1), mask, shaped=True, video_frame=3)
        torch.testing.assert_close(shaped, visual)
        assert make("DGL").get_visual_output(video).shape == (2, 1, 32)


def test_text_behind_its_end_is_not_seen():
    model, ids = make("none"), captions()
    other = ids.clone()
    other[:, 7:] = 3
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), model.encode_text(other))
        assert not torch.allclose(model.encode_text(ids), model.encode_text(ids.roll(1, 1)))
    with pytest.raises(ValueError, match=r"expected input_ids of shape \[B, L\] with L of 1 to 32, got \[1, 33\]"):
        model.encode_text(torch.ones(1, 33, dtype=torch.long))


@pytest.mark.parametrize(
    ("field", "value", "known"),
    [
        ("sim_header", "seqTransf", "expected sim_header as one of meanP, got 'seqTransf'"),
        ("temporal_prompt", "group2", "expected temporal_prompt as one of none, DGL, group2-2, got 'group2'"),
        ("temporal_prompt", "dgl", "none, DGL, group2-2"),
        ("loose_type", False, "expected loose_type=True"),
        ("frame_weights", "clip", "video, batch"),
        ("max_frames", 0, "max_frames as an integer of at least 1"),
        ("tome_r", -1, "r as an integer of at least 0"),
        ("tome_r", "two", "r as an integer of at least 0"),
        ("tome_r", [1, 2, 3], "r with one number for each of the 2 layers, got 3 numbers"),
        ("tome_metric", "queries", "metric as one of keys"),
        ("freeze_layer_num", -2, "freeze_layer_num of at least -1"),
    ],
)
def test_unknown_settings_are_refused(field, value, known):
    with pytest.raises(ValueError, match=known.replace("(", r"\(")):
        CLIP4Clip(None, Sizes(32, 8, 32, 2, 4, 16, 64, 32, 2, 4, 16), SimpleNamespace(**{field: value}))


def test_frame_merging_settings_are_refused():
    for options, message in (
        ({"tome_merge_layers": "1-x"}, "tome_merge_layers as integers with - between them, got '1-x'"),
        ({"tome_merge_proportions": "30"}, "tome_merge_proportions with two numbers"),
        ({}, "merge_layers below the 2 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(tome_frame_merging=True, tome_r=2, **options)


def test_videos_of_a_wrong_shape_are_refused():
    model = tiny(seed=0)
    with pytest.raises(ValueError, match=r"expected frames of shape \[N, 3, 32, 32\], got \[2, 3, 16, 16\]"):
        model.encode_video(torch.zeros(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected video of shape \[B, T, 3, H, W\]"):
        model.encode_video(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="with a frame or more"):
        model.encode_video(torch.zeros(1, 0, 3, 32, 32))


def test_groups_of_the_optimizer():
    model = tiny(temporal_prompt="DGL")
    groups = model.parameter_groups(1e-3, 5e-4, 0.2)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1e-3, 0.2), (1e-3, 0.0), (5e-7, 0.2), (5e-7, 0.0)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    own = {id(p) for g in groups if g["lr"] == 1e-3 for p in g["params"]}
    assert own == {id(p) for p in model.stop.parameters()}
    torch.optim.AdamW(groups)


def test_freezing():
    def free(**options):
        model = tiny(layers=3, text_layers=3, **options)
        return {name for name, p in model.clip.named_parameters() if p.requires_grad}, model

    everything, model = free()
    assert len(everything) == len(list(model.clip.parameters()))
    some, _ = free(freeze_layer_num=2)
    assert {name.split(".resblocks.")[1][0] for name in some if "resblocks" in name} == {"2"}
    assert {"logit_scale", "visual.proj", "text_projection", "visual.ln_post.bias", "ln_final.weight"} < some
    assert not {"visual.conv1.weight", "token_embedding.weight"} & some
    nothing, model = free(freeze_layer_num=12, temporal_prompt="DGL")
    assert not nothing and all(p.requires_grad for p in model.stop.parameters())
    ids, video = captions(), clips()
    model.train()(ids, None, None, video, torch.ones(2, 3)).backward()
    assert all(p.grad is not None for p in model.stop.parameters())
    assert len(model.parameter_groups(1e-3, 5e-4, 0.2)) == 2


def test_weights_of_frames_per_video_and_per_batch():
    video = clips(3)
    with torch.no_grad():
        own, batch = make("group2-2"), make("group2-2", frame_weights="batch")
        alone = torch.cat([own.encode_video(one[None]) for one in video])
        torch.testing.assert_close(own.encode_video(video), alone, rtol=1e-4, atol=1e-5)
        # As published, the embedding of a video depends on the others.
        alone = torch.cat([batch.encode_video(one[None]) for one in video])
        assert (batch.encode_video(video) - alone).abs().max() > 1e-3
        torch.testing.assert_close(alone, torch.cat([own.encode_video(one[None]) for one in video]))
        # One frame has no range of weights.
        assert torch.isfinite(own.encode_video(video[:, :1])).all()


def test_mask_of_pixels_repeats_with_the_grid():
    model = make("group2-2")
    prompt, pixels = model.stop.pixels, clips(1).transpose(1, 2)
    mask = prompt.mask(pixels)
    score = prompt.saliency(pixels)[0, 0]
    for t in range(3):
        cell = {(i, j): score[t, i::4, j::4].mean().item() for i in range(4) for j in range(4)}
        best = sorted(cell, key=cell.get)[-6:]
        for y in range(32):
            for x in range(32):
                assert mask[0, 0, t, y, x] == float((y % 4, x % 4) in best)


def test_autocast_and_half_precision():
    model, video = make("group2-2"), clips()
    model.set_tome(3)
    with torch.no_grad():
        want = model.encode_video(video)
        with torch.autocast("cpu", torch.bfloat16):
            auto = model.encode_video(video)
        half = copy.deepcopy(model).to(torch.bfloat16).encode_video(video)
    for got in (auto, half):
        assert torch.isfinite(got).all() and (got - want).abs().max() < 0.4


def test_autocast_leaves_similarities_in_full_precision():
    model, mask = make("none"), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    width = model.sizes.embed
    text, frames = torch.randn(3, 1, width), torch.randn(3, 3, width)
    want, _ = model.get_similarity_logits(text, frames, None, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = model.get_similarity_logits(text, frames, None, mask)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_copies_and_pickles():
    model, video = make("DGL"), clips()
    model.set_tome(3, trace_source=True)
    with torch.no_grad():
        want = model.encode_video(video)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.encode_video(video), want)


def _rank(rank: int, port: int, counts: list[int], out) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    start, count = sum(counts[:rank]), counts[rank]
    model = tiny(temporal_prompt="DGL", tome_r=2, seed=0, prompt_dropout=0.0).train()
    loss = model(captions(5)[start : start + count], None, None, clips(5)[start : start + count], torch.ones(count, 3))
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    if rank == 0:
        out["loss"] = loss.item()
        out["grads"] = [p.grad for p in model.parameters()]
    dist.destroy_process_group()


def test_the_batch_of_all_processes(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = tiny(temporal_prompt="DGL", tome_r=2, seed=0, prompt_dropout=0.0).train()
    whole = model(captions(5), None, None, clips(5), torch.ones(5, 3))
    whole.backward()
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_rank, (port, [3, 2], out), nprocs=2)
        assert abs(out["loss"] - whole.item()) < 1e-5
        for p, grad in zip(model.parameters(), out["grads"]):
            torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=2e-5)


def test_the_loss_of_equal_logits():
    assert symmetric_cross_entropy(torch.zeros(4, 4)).item() == pytest.approx(F.cross_entropy(
        torch.zeros(1, 4), torch.tensor([0])
    ).item())  # fmt: skip


def test_a_namespace_may_have_more():
    task = SimpleNamespace(temporal_prompt="DGL", tome_r=2, max_frames=8, do_train=1, output_dir="x")
    assert Config.of(task).max_frames == 8
    assert tiny(temporal_prompt=None).stop is None
