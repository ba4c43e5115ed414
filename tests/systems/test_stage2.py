"""PruneVid's second stage behind the first: budgets of its groups, both versions, and the drop-in's parameters."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import vidtok
from tests.models import tiny
from tests.systems.test_prunevid import BOTH, CLOSE, KIND, OPTIONS, reduced
from tests.systems.test_stage1_v2 import VIDEO, script
from vidtok.systems import Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2
from vidtok.systems.prunevid import Qwen25VLPruneVid

ROWS = [[("video", 8, 140)], [("video", 4, 112), ("video", 6, 140)], [("video", 6, 112)]]
DROP = vidtok.Drop("attn_1_0.4", preset="prunevid")


@pytest.fixture(scope="module")
def model():
    return tiny.make(KIND, layers=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return script().tiny_checkpoint(str(tmp_path_factory.mktemp("model") / "tiny"))


def groups(sample):
    """For each output of the first stage, its group: (frame it stands in, whether it is a mean over frames)."""
    cells = sample.grid_thw[1] * sample.grid_thw[2]
    plan = sample.plan
    bounds = plan.offset.tolist()
    frames = [{m // cells for m in plan.member[a:b].tolist()} for a, b in zip(bounds, bounds[1:])]
    return [(int(a) // cells, len(f) > 1) for a, f in zip(plan.anchor.tolist(), frames)]


def shares(sample):
    """Tokens that the second stage kept of each group."""
    of = dict(zip(sample.plan.anchor.tolist(), groups(sample)))
    return Counter(of[a] for a in sample.stages[0][1].anchor.tolist())


def expected_shares(sample, alpha=0.4):
    return Counter({g: int(alpha * n) for g, n in Counter(groups(sample)).items() if int(alpha * n)})


@torch.no_grad()
def test_without_groups_other_tokens_stay(model, monkeypatch):
    inputs = tiny.batch(KIND, ROWS)
    monkeypatch.setattr(vidtok.models.tokens.Tokens, "_groups", lambda *_: None)
    with reduced(model, Qwen25VLStage1WrapperV2, inputs, decoder=DROP) as stage:
        model(**inputs)
        assert any(shares(s) != expected_shares(s) for s in stage.report().samples)


@torch.no_grad()
@BOTH
def test_every_group_keeps_its_share(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    with reduced(model, wrapper, inputs, decoder=DROP) as stage:
        _, out = tiny.generate(model, inputs)
        report = stage.report()
    statics = 0
    for sample in report.samples:
        size = set(groups(sample))
        assert sample.stages[0][0] == 2
        assert shares(sample) == expected_shares(sample)
        statics += sum(static for _, static in size)
        assert len(size) > sample.grid_thw[0]  # groups are not frames
    assert statics > 0
    # Keys and values of every layer are those of the tokens that stayed, and of those decoded since.
    lengths = {layer.keys.shape[-2] for layer in out.past_key_values.layers}
    assert len(lengths) == 1
    kept = [sum(s.stages[0][1].num_out for s in report.samples if s.row == i) for i in range(len(ROWS))]
    text = [int(t) - sum(s.tokens_in for s in report.samples if s.row == i) for i, t in enumerate(report.tokens_in)]
    assert lengths == {max(k + t for k, t in zip(kept, text)) + 4}
    assert len({layer.kv_length for layer in report.layers}) == 1


@torch.no_grad()
def test_versions_agree(model):
    inputs = tiny.batch(KIND, ROWS)
    got = []
    for wrapper in (Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2):
        with reduced(model, wrapper, inputs, decoder=DROP):
            got.append((model(**inputs).logits, tiny.generate(model, inputs)[0]))
    spec = "prunevid:" + ",".join(f"{k}={v}" for k, v in OPTIONS.items())
    with vidtok.attach(model, visual=spec, decoder=DROP):
        direct = tiny.generate(model, inputs)[0]
    with vidtok.attach(model, visual=spec):
        first = tiny.generate(model, inputs)[0]
    torch.testing.assert_close(got[0][0], got[1][0], **CLOSE)
    torch.testing.assert_close(got[0][1], got[1][1], **CLOSE)
    torch.testing.assert_close(got[1][1], direct, **CLOSE)
    assert (direct - first).abs().amax((1, 2)).min() > 1e-2


@torch.no_grad()
@BOTH
def test_rows_of_a_batch_get_what_they_get_alone(model, wrapper):
    inputs = tiny.batch(KIND, ROWS)
    with reduced(model, wrapper, inputs, decoder=DROP):
        together, _ = tiny.generate(model, inputs)
    for i in range(len(ROWS)):
        row = tiny.row(inputs, ROWS, i)
        with reduced(model, wrapper, row, decoder=DROP):
            torch.testing.assert_close(together[i : i + 1], tiny.generate(model, row)[0], **CLOSE)


@torch.no_grad()
@BOTH
def test_decoding_is_that_of_a_cache_cut_by_hand(model, wrapper):
    """The prompt's keys and values of the tokens that stayed, given to the model as it is without any hook."""
    inputs = tiny.batch(KIND, ROWS[:1])
    whole = vidtok.Drop("attn_1_0.4", preset="prunevid", compress=False)
    positions = []
    language = model.model.language_model
    hook = language.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    with reduced(model, wrapper, inputs, decoder=DROP):
        logits, out = tiny.generate(model, inputs, steps=2)
    hook.remove()
    with reduced(model, wrapper, inputs, decoder=whole) as stage:
        prompt = model(**inputs, use_cache=True).past_key_values
        sample = stage.report().samples[0]
    # Columns of the first stage's row: text in front, outputs of the plan in order, text behind.
    front = int((inputs["input_ids"][0] == tiny.VIDEO).nonzero()[0, 0])
    outputs = sample.plan.anchor.tolist()
    kept = [outputs.index(a) for a in sample.stages[0][1].anchor.tolist()]
    width = prompt.layers[0].keys.shape[-2]
    columns = [*range(front), *(front + k for k in kept), *range(front + len(outputs), width)]
    from transformers import DynamicCache

    cut = DynamicCache()
    for i, layer in enumerate(prompt.layers):
        at = columns if layer.keys.shape[-2] == width else slice(None)
        cut.update(layer.keys[:, :, at], layer.values[:, :, at], i)
    token = out.sequences[:, inputs["input_ids"].shape[1]]
    hidden = language(
        inputs_embeds=model.get_input_embeddings()(token)[:, None],
        position_ids=positions[-1][-3:],
        attention_mask=torch.ones(1, len(columns) + 1, dtype=torch.long),
        past_key_values=cut,
        cache_position=torch.arange(len(columns), len(columns) + 1),
    ).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden)[:, 0], logits[:, 1], **CLOSE)


def test_parameters_of_the_drop_in(checkpoint):
    answers = []
    for version in ("v1", "v2"):
        options = {"selected_layer": 0, "alpha": 0.4, "max_frames": 8, "stage1_version": version}
        with Qwen25VLPruneVid(checkpoint, enable_stage2=True, **options) as m:
            answers.append(m.generate(VIDEO, "What is happening?", max_new_tokens=12))
            sample = m.report().samples[0]
            ((layer, plan),) = sample.stages
            assert layer == 1 and 0 < plan.num_out <= int(0.4 * sample.tokens_out)
            assert shares(sample) == expected_shares(sample)
    assert answers[0] == answers[1]


def test_second_stage_alone(checkpoint):
    with Qwen25VLPruneVid(checkpoint, enable_stage1=False, enable_stage2=True, selected_layer=0, max_frames=8) as m:
        m.generate(VIDEO, "What is happening?", max_new_tokens=3)
        sample = m.report().samples[0]
    t, h, w = sample.grid_thw
    assert sample.tokens_out == sample.tokens_in == t * h * w
    assert sample.stages[0][1].num_out == t * int(0.4 * h * w)


def test_keeping_all_is_the_first_stage_alone(checkpoint):
    answers = []
    for stage2 in (False, True):
        with Qwen25VLPruneVid(checkpoint, enable_stage2=stage2, selected_layer=0, alpha=1.0, max_frames=8) as m:
            answers.append(m.generate(VIDEO, "What?", max_new_tokens=12))
    assert answers[0] == answers[1]


def test_a_layer_that_the_model_does_not_have(checkpoint):
    with pytest.raises(ValueError, match=r"spec 'attn_10_0\.4': expected a layer from 0 to 0 of the model's 2, got 10"):
        Qwen25VLPruneVid(checkpoint, enable_stage2=True)
