"""The language-model-input hook gives the same logits however the same reduced prompt is run."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.models import tiny
from vidtok import ops
from vidtok.models.visual import InputHook

CLOSE = {"rtol": 0, "atol": 2e-5}


class Recorder:
    """What reaches a module, call by call."""

    def __init__(self, module):
        self.calls = []
        self.hook = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.calls.append(dict(kwargs))

    def __enter__(self):
        return self.calls

    def __exit__(self, *error):
        self.hook.remove()


def into_language_model(model):
    return Recorder(model.model.language_model)


@pytest.mark.parametrize("method", [tiny.drop, tiny.merge], ids=["drop", "merge"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cached_equals_uncached_equals_alone(models, kind, attention, method):
    model = models(kind, attention)
    inputs = tiny.batch(kind, tiny.ROWS)
    plain, _ = tiny.generate(model, inputs)
    with vidtok.attach(model, visual=method):
        cached, out = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
        assert out.past_key_values.layers[0].get_seq_length() < inputs["input_ids"].shape[1]
        torch.testing.assert_close(cached, uncached, **CLOSE)
        for i in range(len(tiny.ROWS)):
            alone, _ = tiny.generate(model, tiny.row(inputs, tiny.ROWS, i))
            torch.testing.assert_close(cached[i : i + 1], alone, **CLOSE)
    assert (cached - plain)[:, 0].abs().amax(-1).min() > 1e-2
    again, _ = tiny.generate(model, inputs)
    assert torch.equal(plain, again)


SPECS = (
    "uniform:ratio=0.3", "random:k=5,seed=1", "dtd:threshold=0.5", "evs:ratio=0.4", "prunevid:tau=0.8", "tome:r=2",
    "pool:level=2", "pool:level=2+uniform:ratio=0.5", "uniform:ratio=0.5,images=true",
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_method(models, kind, spec):
    model, inputs = models(kind), tiny.batch(kind, tiny.MIXED)
    with vidtok.attach(model, visual=spec) as handle:
        cached, _ = tiny.generate(model, inputs, steps=3)
        report = handle.report()
        uncached, _ = tiny.generate(model, inputs, steps=3, use_cache=False)
        alone, _ = tiny.generate(model, tiny.row(inputs, tiny.MIXED, 1), steps=3)
    torch.testing.assert_close(cached, uncached, **CLOSE)
    torch.testing.assert_close(cached[1:], alone, **CLOSE)
    assert sum(report.tokens_out) < sum(report.tokens_in)
    for sample in report.samples:
        sample.plan.validate()
        assert 1 <= sample.tokens_out <= sample.tokens_in


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_identity_is_bit_equal(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    plain, _ = tiny.generate(model, inputs)
    forward = model(**inputs).logits
    for method in (tiny.keep_all, "uniform:ratio=1"):
        with vidtok.attach(model, visual=method):
            kept, _ = tiny.generate(model, inputs)
            assert torch.equal(plain, kept)
            assert torch.equal(forward, model(**inputs).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_text_only_calls_are_untouched(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    text = tiny.batch(kind, [[], []])
    plain, _ = tiny.generate(model, text)
    with vidtok.attach(model, visual=tiny.drop):
        before, _ = tiny.generate(model, text)
        tiny.generate(model, inputs)
        after, _ = tiny.generate(model, text)
    assert torch.equal(plain, before)
    assert torch.equal(plain, after)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_pixels_reach_the_answer(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    with vidtok.attach(model, visual=tiny.merge):
        one, _ = tiny.generate(model, inputs)
        other, _ = tiny.generate(model, inputs | {"pixel_values_videos": inputs["pixel_values_videos"].flip(0)})
    assert (one - other)[:, 0].abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_images_stay_whole_unless_asked(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.MIXED)
    config = model.config

    class Both:
        images = True

        def __call__(self, features, grid_thw):
            assert features.shape[0] == int(grid_thw.prod(-1).sum())
            return tiny.drop(features, grid_thw)

    for method, reduced in ((tiny.drop, {"video"}), (Both(), {"video", "image"})):
        with vidtok.attach(model, visual=method) as handle:
            cached, _ = tiny.generate(model, inputs)
            uncached, _ = tiny.generate(model, inputs, use_cache=False)
            tiny.generate(model, inputs)
            report = handle.report()
            torch.testing.assert_close(cached, uncached, **CLOSE)
            for i in range(len(tiny.MIXED)):
                alone, _ = tiny.generate(model, tiny.row(inputs, tiny.MIXED, i))
                torch.testing.assert_close(cached[i : i + 1], alone, **CLOSE)
        assert {s.kind for s in report.samples} == reduced
        clips = [(i, clip[0]) for i, clips in enumerate(tiny.MIXED) for clip in clips if clip[0] in reduced]
        assert [(s.row, s.kind) for s in report.samples] == clips
        for i, (tokens_in, tokens_out) in enumerate(zip(report.tokens_in, report.tokens_out)):
            ids = inputs["input_ids"][i]
            assert tokens_in == int(inputs["attention_mask"][i].sum())
            lost = sum(s.tokens_in - s.tokens_out for s in report.samples if s.row == i)
            assert tokens_out == tokens_in - lost
            if "image" not in reduced:
                assert lost < int((ids == config.video_token_id).sum())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_grids_are_those_of_the_videos(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    seen = []

    def look(features, grid_thw):
        seen.append((features.shape, grid_thw.tolist()))
        return tiny.drop(features, grid_thw)

    with vidtok.attach(model, visual=look), into_language_model(model):
        tiny.generate(model, inputs, steps=1)
        model(**inputs)
    merged = [[t, h // 2, w // 2] for t, h, w in inputs["video_grid_thw"].tolist()]
    assert [grids for _, grids in seen] == [merged, merged]
    assert seen[0][0] == (sum(t * h * w for t, h, w in merged), 64)


@pytest.mark.parametrize("seconds", [None, 0.5, 1.7])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_positions_are_kept(models, kind, seconds):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    if seconds is not None:
        if kind != "qwen2_5_vl":
            return
        inputs["second_per_grid_ts"] = torch.tensor([seconds] * 4)
    with into_language_model(model) as plain:
        tiny.generate(model, inputs, steps=3)
    plans = []

    def method(features, grid_thw):
        plans.append(tiny.merge(features, grid_thw))
        return plans[-1]

    with vidtok.attach(model, visual=method), into_language_model(model) as reduced:
        tiny.generate(model, inputs, steps=3)
    length = inputs["input_ids"].shape[1]
    columns = (inputs["input_ids"].reshape(-1) == tiny.VIDEO).nonzero().squeeze(1)
    kept = inputs["attention_mask"].reshape(-1).bool().clone()
    kept[columns] = False
    kept[columns[plans[0].anchor.long()]] = True
    before, after = plain[0]["position_ids"][-3:], reduced[0]["position_ids"][-3:]
    mask = reduced[0]["attention_mask"].bool()
    for i in range(len(tiny.ROWS)):
        assert torch.equal(after[:, i, mask[i]], before[:, i, kept.view(-1, length)[i]])
    for first, second in zip(plain[1:], reduced[1:]):
        assert torch.equal(first["position_ids"][-3:], second["position_ids"][-3:])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_positions_are_renumbered(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    with vidtok.attach(model, visual=tiny.drop, position="renumber"):
        with into_language_model(model) as calls:
            cached, _ = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
        torch.testing.assert_close(cached, uncached, **CLOSE)
        alone, _ = tiny.generate(model, tiny.row(inputs, tiny.ROWS, 1))
        torch.testing.assert_close(cached[1:2], alone, **CLOSE)
    counts = calls[0]["attention_mask"].sum(1)
    for step, call in enumerate(calls):
        assert torch.equal(call["position_ids"][-1, :, -1], counts - 1 + step)
        assert bool((call["position_ids"] == call["position_ids"][:1]).all())
    with vidtok.attach(model, visual=tiny.drop):
        keep, _ = tiny.generate(model, inputs)
    assert (keep - cached).abs().max() > 1e-2


@torch.no_grad()
def test_deepstack_moves_by_the_plan(models, monkeypatch):
    model, inputs = models("qwen3_vl"), tiny.batch("qwen3_vl", tiny.MIXED)
    with into_language_model(model) as plain:
        model(**inputs)
    plans = []

    def method(features, grid_thw):
        plans.append(tiny.merge(features, grid_thw))
        return plans[-1]

    with vidtok.attach(model, visual=method), into_language_model(model) as reduced:
        whole = model(**inputs).logits[:, -1]
    mask = plain[0]["visual_pos_masks"]
    video = (inputs["input_ids"] == tiny.VIDEO)[mask]
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    for before, after in zip(plain[0]["deepstack_visual_embeds"], reduced[0]["deepstack_visual_embeds"]):
        moved = ops.plan_apply(plans[0], before[video].contiguous())
        whole_images = before[~video]
        assert after.shape[0] == moved.shape[0] + whole_images.shape[0]
        # Videos and images alternate, so look for each expected row at its place among its own kind.
        at = torch.cdist(moved, after, **exact).min(1)
        assert at.values.max() < 1e-6 and bool((at.indices.diff() > 0).all())
        at = torch.cdist(whole_images, after, **exact).min(1)
        assert at.values.max() < 1e-6 and bool((at.indices.diff() > 0).all())
    assert int(reduced[0]["visual_pos_masks"].sum()) == after.shape[0]

    def anchors_only(changed, plan, rows, columns, real):
        gather = vidtok.Plan.gather(plan.anchor, plan.cu_seqlens_in, plan.cu_seqlens_out, plan.num_in)
        original(changed, gather, rows, columns, real)

    original = InputHook._deepstack
    monkeypatch.setattr(InputHook, "_deepstack", staticmethod(anchors_only))
    with vidtok.attach(model, visual=tiny.merge):
        wrong = model(**inputs).logits[:, -1]
    assert (whole - wrong).abs().max() > 1e-3
    monkeypatch.setattr(InputHook, "_deepstack", staticmethod(lambda *args: None))
    with vidtok.attach(model, visual=tiny.merge), pytest.raises((IndexError, RuntimeError)):
        model(**inputs)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gaps_in_text_positions_are_not_packed_rows(models, kind, monkeypatch):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS[:1])
    length = inputs["input_ids"].shape[1]
    with into_language_model(model) as calls:
        model(**inputs, use_cache=False)
    position = calls[0]["position_ids"][-3:]
    four = torch.cat([torch.arange(length).view(1, 1, -1), position])
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vidtok.attach(model, visual=tiny.drop):
        right = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(model(**bare, position_ids=four, use_cache=False).logits, right, **CLOSE)

        def gaps(self, given, rows, *rest):
            return ops.position_remap(rows, given, dim=-1)[0]

        prefill = InputHook._prefill

        def without_mask(*args):
            changed = prefill(*args)
            changed["attention_mask"] = None
            return changed

        monkeypatch.setattr(InputHook, "_positions", gaps)
        monkeypatch.setattr(InputHook, "_prefill", without_mask)
        wrong = model(**bare, position_ids=four, use_cache=False).logits
        assert (wrong - right).abs().max() > 1e-2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_flash_attention_sees_no_packed_rows(models, kind):
    from transformers.modeling_flash_attention_utils import _is_packed_sequence as packed

    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS[:1])
    length = inputs["input_ids"].shape[1]
    with into_language_model(model) as plain:
        model(**inputs, use_cache=False)
    text = torch.arange(length)[None]
    four = torch.cat([text[None], plain[0]["position_ids"][-3:]])
    plans = []

    def method(features, grid_thw):
        plans.append(tiny.drop(features, grid_thw))
        return plans[-1]

    with vidtok.attach(model, visual=method), into_language_model(model) as reduced:
        model(**inputs, position_ids=four, use_cache=False)
    assert not packed(reduced[0]["position_ids"][0], 1)
    kept = torch.ones(length, dtype=torch.bool)
    columns = (inputs["input_ids"][0] == tiny.VIDEO).nonzero().squeeze(1)
    kept[columns] = False
    kept[columns[plans[0].anchor.long()]] = True
    assert packed(text[:, kept], 1)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_right_padding(models, kind):
    model = models(kind)
    inputs = tiny.batch(kind, tiny.ROWS, side="right")
    with vidtok.attach(model, visual=tiny.drop):
        together = model(**inputs, use_cache=False).logits
        for i in range(len(tiny.ROWS)):
            alone = model(**tiny.row(inputs, tiny.ROWS, i), use_cache=False).logits
            torch.testing.assert_close(together[i : i + 1, -alone.shape[1] :], alone, **CLOSE)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_chunked_prefill_is_refused(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS[:1])
    with vidtok.attach(model, visual=tiny.drop) as handle:
        with pytest.raises((ValueError, RuntimeError)) as error:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=16)
        assert handle.active
    assert "prefill_chunk_size" in str(error.value)


def test_packed_rows_are_refused(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    with into_language_model(model) as calls:
        model(**inputs, use_cache=False)
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length)
    text[10:] -= 10
    position = torch.cat([text.view(1, 1, -1), calls[0]["position_ids"][-3:]])
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vidtok.attach(model, visual=tiny.drop):
        with pytest.raises(ValueError, match="packed"):
            model(**bare, position_ids=position, use_cache=False)
        with pytest.raises(ValueError, match="attention mask of shape"):
            model(**(inputs | {"attention_mask": torch.ones(1, 1, length, length)}), position_ids=position[1:])
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([3, 4]))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_text_positions_for_a_video_are_refused(models, kind):
    model, inputs = models(kind), tiny.batch(kind, tiny.ROWS)
    shape = inputs["input_ids"].shape
    flat = torch.arange(shape[1]).expand(3, *shape)
    with vidtok.attach(model, visual=tiny.drop):
        for position in (flat, flat[0]):
            with pytest.raises(ValueError, match="M-RoPE"):
                model(**inputs, position_ids=position)
        if tiny.VERSION[0] > 4:
            del inputs["mm_token_type_ids"]
            with pytest.raises(ValueError, match="mm_token_type_ids"):
                model.generate(**inputs, max_new_tokens=2)
            with pytest.raises(ValueError, match="mm_token_type_ids"):
                model(**inputs)
    with vidtok.attach(model, visual=tiny.drop, position="renumber"), pytest.raises(ValueError, match="tokens of this"):
        model(**inputs, position_ids=flat[..., 1:])


def test_embeddings_instead_of_ids(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with into_language_model(model) as calls:
        model(**inputs)
    with vidtok.attach(model, visual=tiny.drop):
        right = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
        out = model(inputs_embeds=embeds, **rest, position_ids=calls[0]["position_ids"][-3:]).logits
    torch.testing.assert_close(out, right, **CLOSE)


def test_a_clip_of_one_token(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", [[("video", 2, 28)], [("video", 8, 112)]])
    with vidtok.attach(model, visual=tiny.drop) as handle:
        cached, _ = tiny.generate(model, inputs)
        assert [(s.tokens_in, s.tokens_out) for s in handle.report().samples] == [(1, 1), (64, 32)]
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
    torch.testing.assert_close(cached, uncached, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    model = tiny.make("qwen2_5_vl").to(dtype)
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    with vidtok.attach(model, visual=tiny.merge), into_language_model(model) as calls:
        logits, _ = tiny.generate(model, inputs)
    assert calls[0]["inputs_embeds"].dtype == dtype
    assert torch.isfinite(logits.float()).all()


def test_method_results_are_checked(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    plain = model(**inputs).logits
    for method, error in (
        (lambda f, g: None, TypeError),
        (lambda f, g: vidtok.Plan.identity([3]), ValueError),
        (lambda f, g: vidtok.Plan.identity([f.shape[0]]), ValueError),
    ):
        with vidtok.attach(model, visual=method), pytest.raises(error, match="expected"):
            model(**inputs)
    assert torch.equal(plain, model(**inputs).logits)
