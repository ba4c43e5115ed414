"""The wrappers of PruneVid's first stage: what they promise, and the ways in which such wrappers go wrong."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch

import vidtok
from tests.models import tiny
from tests.models.test_cache import extended
from vidtok.methods import prunevid
from vidtok.systems import Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2, features, stage1

KIND = "qwen2_5_vl"
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
OPTIONS = {"tau": 0.8, "cluster_ratio": 0.5, "temporal_segment_ratio": 0.5}
ROWS = [[("video", 8, 112)], [("video", 4, 112), ("video", 3, 140)], [("video", 6, 112)]]
BOTH = pytest.mark.parametrize("wrapper", [Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2])


@pytest.fixture(scope="module")
def model():
    return tiny.make(KIND)


@pytest.fixture(autouse=True)
def untouched(model):
    """Every test leaves the model without hooks and without stand-ins for its methods."""
    yield
    assert not {"get_video_features", "generate"} & (set(model.model.__dict__) | set(model.__dict__))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def info(inputs):
    return {"video_grid_thw": inputs["video_grid_thw"], "pixel_values_videos": inputs["pixel_values_videos"]}


@contextmanager
def reduced(model, wrapper, inputs, **options):
    """A wrapper that has been told of the videos of ``inputs``."""
    with wrapper(model=model, **{**OPTIONS, **options}) as stage, stage.video_info(**info(inputs)):
        yield stage


@contextmanager
def into_language_model(model):
    calls = []

    def note(module, args, kwargs):
        calls.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, tiny.MIXED, [[("video", 1, 140)]]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_versions_give_the_same_logits(model, rows, side):
    inputs = tiny.batch(KIND, rows, side=side)
    plain = model(**inputs).logits
    got = []
    for wrapper in (Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2):
        with reduced(model, wrapper, inputs) as stage:
            logits = model(**inputs).logits
            steps = tiny.generate(model, inputs)[0] if side == "left" else logits
            got.append((logits, steps, stage.report().tokens_out))
    with vidtok.attach(model, visual="prunevid:tau=0.8,cluster_ratio=0.5,temporal_segment_ratio=0.5") as handle:
        direct = model(**inputs).logits
        assert got[0][2] == got[1][2] == handle.report().tokens_out
    torch.testing.assert_close(got[0][0], got[1][0], **CLOSE)
    torch.testing.assert_close(got[0][1], got[1][1], **CLOSE)
    torch.testing.assert_close(got[1][0], direct, **CLOSE)
    if rows is not tiny.MIXED:
        assert got[0][0].shape[1] < plain.shape[1]


@torch.no_grad()
@BOTH
def test_rows_of_a_batch_get_what_they_get_alone(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    with reduced(model, wrapper, inputs):
        cached, _ = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
    torch.testing.assert_close(cached, uncached, **CLOSE)
    for i in range(len(ROWS)):
        row = tiny.row(inputs, ROWS, i)
        with reduced(model, wrapper, row):
            torch.testing.assert_close(cached[i : i + 1], tiny.generate(model, row)[0], **CLOSE)


@torch.no_grad()
@BOTH
def test_pixels_reach_the_answer_through_the_vision_tower(model, wrapper):
    inputs = tiny.batch(KIND, ROWS[1:2])
    other = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    ran = []
    hook = model.model.visual.register_forward_hook(lambda *_: ran.append(1))
    try:
        with reduced(model, wrapper, inputs):
            one, _ = tiny.generate(model, inputs)
            assert len(ran) == 1
            two, _ = tiny.generate(model, other)
            assert len(ran) == 2
            model(**inputs)
            assert len(ran) == 3
    finally:
        hook.remove()
    assert (one - two)[:, 0].abs().max() > 1e-2


@torch.no_grad()
@BOTH
def test_predictions_are_not_those_of_the_unreduced_model(model, wrapper, monkeypatch):
    inputs = tiny.batch(KIND, ROWS)

    def difference():
        plain, _ = tiny.generate(model, inputs)
        with reduced(model, wrapper, inputs) as stage:
            ours, _ = tiny.generate(model, inputs)
            assert all(s.tokens_out <= s.tokens_in for s in stage.report().samples)
        return (plain - ours).abs().amax((1, 2)).min()

    assert difference() > 1e-2
    # Control: a wrapper that does nothing is found out.
    monkeypatch.setattr(
        stage1, "prunevid", lambda x, grids, **_: vidtok.Plan.identity([t * h * w for t, h, w in grids])
    )
    assert difference() == 0


@torch.no_grad()
@BOTH
def test_keeping_everything_changes_no_bit(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    plain, base = tiny.generate(model, inputs)[0], model(**inputs).logits
    with reduced(model, wrapper, inputs, tau=1.0, cluster_ratio=1.0):
        assert torch.equal(tiny.generate(model, inputs)[0], plain)
        assert torch.equal(model(**inputs).logits, base)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("seconds", [None, 0.5, 1.7])
def test_positions_are_those_of_the_complete_prompt(model, wrapper, seconds, monkeypatch):
    inputs = tiny.batch(KIND, ROWS)
    if seconds is not None:
        inputs["second_per_grid_ts"] = torch.tensor([seconds] * 4)
    with into_language_model(model) as plain:
        tiny.generate(model, inputs, steps=3)
    # The language model's own hook comes last, so that it sees what the model is given in the end.
    with reduced(model, wrapper, inputs) as stage, into_language_model(model) as ours:
        tiny.generate(model, inputs, steps=3)
        plans = [sample.plan for sample in stage.report().samples]
    columns = (inputs["input_ids"].reshape(-1) == tiny.VIDEO).nonzero().squeeze(1)
    kept = inputs["attention_mask"].reshape(-1).bool().clone()
    kept[columns] = False
    starts = torch.tensor([0, *[p.num_in for p in plans]]).cumsum(0).tolist()
    for plan, start in zip(plans, starts):
        kept[columns[start + plan.anchor.long()]] = True
    kept = kept.view(len(ROWS), -1)
    before, after, mask = plain[0]["position_ids"][-3:], ours[0]["position_ids"][-3:], ours[0]["attention_mask"].bool()
    for i in range(len(ROWS)):
        assert torch.equal(after[:, i, mask[i]], before[:, i, kept[i]])
    # Decoded tokens stand where the unreduced model of this version puts them.
    for first, second in zip(plain[1:], ours[1:]):
        assert torch.equal(first["position_ids"][-3:], second["position_ids"][-3:])


@torch.no_grad()
@BOTH
def test_text_between_two_videos_survives(model, wrapper):
    inputs = tiny.batch(KIND, ROWS[1:2])
    ids = inputs["input_ids"]
    with reduced(model, wrapper, inputs), into_language_model(model) as calls:
        model(**inputs)
        first = model(**inputs).logits[:, -1]
        place = (ids[0] == tiny.END).nonzero()[0, 0] + 1
        assert int(ids[0, place]) not in (tiny.VIDEO, tiny.START)
        changed = ids.clone()
        changed[0, place] = 77
        second = model(**inputs | {"input_ids": changed}).logits[:, -1]
    text = ids[ids != tiny.VIDEO]
    words = model.get_input_embeddings()(text)
    given = calls[0]["inputs_embeds"][0]
    at = [int((given == w).all(-1).nonzero()[0, 0]) for w in words.unique(dim=0)]
    assert len(at) == len(text.unique())
    assert (first - second).abs().max() > 1e-3


@torch.no_grad()
@BOTH
def test_every_video_is_merged_by_its_own_grid(model, wrapper):
    inputs = tiny.batch(KIND, ROWS[1:2])
    grids = [(2, 4, 4), (2, 5, 5)]
    out = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    parts = getattr(out, "pooler_output", out)
    with reduced(model, wrapper, inputs) as stage:
        model(**inputs)
        samples = stage.report().samples
    assert [s.grid_thw for s in samples] == grids
    for part, grid, sample in zip(parts, grids, samples):
        alone = prunevid(part, [grid], **OPTIONS)
        assert torch.equal(alone.anchor, sample.plan.anchor)
        assert sample.tokens_out < sample.tokens_in


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 12])
def test_short_videos(model, wrapper, frames):
    inputs = tiny.batch(KIND, [[("video", frames, 112)]])
    with reduced(model, wrapper, inputs, temporal_segment_ratio=0.25) as stage:
        logits, _ = tiny.generate(model, inputs)
        assert stage.report().samples[0].grid_thw[0] == (frames + 1) // 2
    assert logits.isfinite().all()


@torch.no_grad()
@BOTH
def test_nothing_is_reduced_before_set_and_after_clear(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    plain = model(**inputs).logits
    ids = torch.arange(10, 30)[None]
    text = model(ids).logits
    with wrapper(model=model, **OPTIONS) as stage:
        assert torch.equal(model(**inputs).logits, plain)
        stage.set_video_info(**info(inputs))
        assert stage.current_video_grid_thw == inputs["video_grid_thw"].tolist()
        assert model(**inputs).logits.shape[1] < plain.shape[1]
        assert torch.equal(model(ids).logits, text)
        stage.clear_video_info()
        stage.clear_video_info()
        assert torch.equal(model(**inputs).logits, plain)
        stage.set_video_info(video_grid_thw=None)
        assert torch.equal(model(**inputs).logits, plain)
    assert not stage.active and "restored" in repr(stage)
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@BOTH
def test_a_failure_leaves_nothing_behind(model, wrapper, monkeypatch):
    inputs = tiny.batch(KIND, ROWS[:1])
    plain = model(**inputs).logits
    ids = torch.arange(10, 30)[None]
    text = model(ids).logits

    def fail():
        handle = model.model.language_model.layers[1].register_forward_pre_hook(_raise)
        with pytest.raises(RuntimeError, match="out of luck"):
            model(**inputs)
        handle.remove()

    with wrapper(model=model, **OPTIONS) as stage:
        stage.set_video_info(**info(inputs))
        fail()
        assert stage.current_video_grid_thw is None
        assert torch.equal(model(ids).logits, text)
        assert torch.equal(model(**inputs).logits, plain)
    # Control: without the hook that forgets, the grid stays.
    monkeypatch.setattr(stage1._Forget, "__call__", lambda *_: None)
    with wrapper(model=model, **OPTIONS) as stage:
        stage.set_video_info(**info(inputs))
        fail()
        assert stage.current_video_grid_thw is not None


class Unlucky:
    """A logits processor that fails between two passes of the model."""

    def __call__(self, input_ids, scores):
        raise RuntimeError("out of luck")


@torch.no_grad()
@BOTH
def test_a_failure_of_generate_outside_of_the_model(model, wrapper):
    inputs = tiny.batch(KIND, ROWS[:1])
    plain = model(**inputs).logits
    with wrapper(model=model, **OPTIONS) as stage:
        for options, error in (({"logits_processor": [Unlucky()]}, RuntimeError), ({"no_such_option": 1}, ValueError)):
            stage.set_video_info(**info(inputs))
            with pytest.raises(error):
                model.generate(**inputs, max_new_tokens=2, **options)
            assert stage.current_video_grid_thw is None
            assert torch.equal(model(**inputs).logits, plain)


def _raise(*_):
    raise RuntimeError("out of luck")


@torch.no_grad()
@BOTH
def test_other_videos_than_announced_are_refused(model, wrapper):
    inputs, other = tiny.batch(KIND, ROWS[:1]), tiny.batch(KIND, ROWS[1:2])
    plain = model(**other).logits
    with wrapper(model=model, **OPTIONS) as stage:
        stage.set_video_info(**info(inputs))
        with pytest.raises(ValueError, match=r"videos of set_video_info, of grids \[\[4, 8, 8\]\], got \[\[2, 8, 8\]"):
            model.generate(**other, max_new_tokens=2)
        assert stage.current_video_grid_thw is None
        assert torch.equal(model(**other).logits, plain)
        for bad in (torch.ones(3, dtype=torch.long), torch.ones(1, 3), [[1, 2]], [[-1, 2, 2]], "4x8x8"):
            with pytest.raises(ValueError, match=r"expected video_grid_thw as integers of shape \[V, 3\], got "):
                stage.set_video_info(video_grid_thw=bad)
        with pytest.raises(ValueError, match="expected 256 patches for these grids, got pixel_values_videos of 9"):
            stage.set_video_info(video_grid_thw=[[4, 8, 8]], pixel_values_videos=torch.zeros(9, 4))
        with pytest.raises(ValueError, match="got pixel_values_videos of list"):
            stage.set_video_info(video_grid_thw=[[4, 8, 8]], pixel_values_videos=[9, 4])
        assert stage.current_video_grid_thw is None


@BOTH
def test_bad_options(model, wrapper):
    for options, message in (
        ({"tau": 2}, "tau"),
        ({"cluster_ratio": 0}, "cluster_ratio"),
        ({"temporal_segment_ratio": 1.5}, "temporal_segment_ratio"),
        ({"position": "first"}, "position"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapper(model=model, **options)
    with pytest.raises(ValueError, match="expected one of "):
        wrapper(model=torch.nn.Linear(2, 2))
    with wrapper(model=model), pytest.raises(ValueError, match="restore"):
        wrapper(model=model)


@torch.no_grad()
@BOTH
def test_copies_and_pickles_are_plain_models(model, wrapper):
    inputs = tiny.batch(KIND, ROWS[:1])
    plain = model(**inputs).logits
    with reduced(model, wrapper, inputs):
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert model(**inputs).logits.shape[1] < plain.shape[1]
        for other in (copied, loaded):
            assert torch.equal(other(**inputs).logits, plain)
            assert other.model.get_video_features.__self__ is other.model
            assert other.generate.__self__ is other


@torch.no_grad()
def test_version_1_merges_in_get_video_features(model):
    inputs = tiny.batch(KIND, ROWS[1:2])
    take = model.model.get_video_features

    def lengths():
        out = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return [len(part) for part in getattr(out, "pooler_output", out)]

    assert lengths() == [32, 50]
    for wrapper, merged in ((Qwen25VLStage1Wrapper, True), (Qwen25VLStage1WrapperV2, False)):
        with reduced(model, wrapper, inputs) as stage, into_language_model(model) as calls:
            model(**inputs)
            counts = [s.tokens_out for s in stage.report().samples]
            assert lengths() == (counts if merged else [32, 50])
            width = inputs["input_ids"].shape[1] - 82 + sum(counts)
            # Hooks run in order: this one sees what the language model is given after all.
            assert calls[0]["inputs_embeds"].shape[1] == width
            stage.clear_video_info()
            assert lengths() == [32, 50]
    assert model.model.get_video_features == take


@torch.no_grad()
def test_version_1_needs_the_positions_of_the_complete_prompt(model, monkeypatch):
    inputs = tiny.batch(KIND, ROWS)
    with reduced(model, Qwen25VLStage1WrapperV2, inputs):
        right = model(**inputs).logits

    def simplified(module, arguments):
        """The first positions of the video for whatever tokens remain."""
        positions = original(module, arguments)
        return positions.roll(3, dims=-1)

    original = features._full_positions
    monkeypatch.setattr(features, "_full_positions", simplified)
    with reduced(model, Qwen25VLStage1Wrapper, inputs):
        assert (model(**inputs).logits - right).abs().max() > 1e-2


@BOTH
def test_training_shortens_labels(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.VIDEO, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with reduced(model, wrapper, inputs):
        out = model(**inputs, labels=labels.clone())
        out.loss.backward()
        grad = model.model.visual.merger.mlp[0].weight.grad.clone()
    model.zero_grad()
    with vidtok.attach(model, visual="prunevid:tau=0.8,cluster_ratio=0.5,temporal_segment_ratio=0.5"):
        expected = model(**inputs, labels=labels.clone())
        expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(grad, model.model.visual.merger.mlp[0].weight.grad, atol=1e-5, rtol=1e-3)
    assert grad.abs().max() > 0
    model.zero_grad()


@torch.no_grad()
def test_beams(model):
    inputs = tiny.batch(KIND, ROWS[:2])
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with vidtok.attach(model, visual="prunevid:tau=0.8,cluster_ratio=0.5,temporal_segment_ratio=0.5"):
        expected = model.generate(**inputs, **options)
    with reduced(model, Qwen25VLStage1WrapperV2, inputs):
        assert torch.equal(model.generate(**inputs, **options), expected)
    with reduced(model, Qwen25VLStage1Wrapper, inputs):
        if tiny.VERSION < (5, 23):
            assert torch.equal(model.generate(**inputs, **options), expected)
        else:
            with pytest.raises(ValueError, match="use version 2"):
                model.generate(**inputs, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_relatives(kind):
    model = tiny.make(kind)
    inputs = tiny.batch(kind, ROWS)
    with reduced(model, Qwen25VLStage1WrapperV2, inputs) as stage:
        cached, _ = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
        torch.testing.assert_close(cached, uncached, **CLOSE)
        assert stage.report().tokens_out < stage.report().tokens_in
    if kind == "qwen2_vl":
        with reduced(model, Qwen25VLStage1Wrapper, inputs):
            torch.testing.assert_close(tiny.generate(model, inputs)[0], cached, **CLOSE)
    else:
        with pytest.raises(ValueError, match=r"expected a Qwen2-VL or Qwen2\.5-VL model for version 1, got qwen3_vl"):
            Qwen25VLStage1Wrapper(model=model)


@torch.no_grad()
def test_verbose(model, capsys):
    inputs = tiny.batch(KIND, ROWS[:1])
    with reduced(model, Qwen25VLStage1WrapperV2, inputs, verbose=True) as stage:
        model(**inputs)
        count = stage.report().samples[0].tokens_out
    assert f"Stage 1 V2: video of 4x4x4, 64 -> {count} visual tokens" in capsys.readouterr().out


@torch.no_grad()
@BOTH
def test_caches_and_later_turns(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    words = torch.arange(20, 27).expand(len(ROWS), -1)
    with wrapper(model=model, **OPTIONS) as stage:
        with stage.video_info(**info(inputs)):
            dynamic, first = tiny.generate(model, inputs)
            static, _ = tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, dynamic, **CLOSE)
            turn = extended(inputs, torch.cat([first.sequences[:, -5:], words], 1))
            whole, _ = tiny.generate(model, turn, steps=3)
        # The announced videos are forgotten, the cache knows what it holds.
        text = {name: turn[name] for name in ("input_ids", "attention_mask")}
        later, _ = tiny.generate(model, text, steps=3, past_key_values=first.past_key_values)
        torch.testing.assert_close(later, whole, **CLOSE)
