"""What a handle reports is what was executed."""

from __future__ import annotations

import torch

import vidtok
from tests.models import tiny
from vidtok import ops


def test_report_of_a_generation(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    plans, seen = [], []

    def method(features, grid_thw):
        plans.append(tiny.merge(features, grid_thw))
        seen.append(features.clone())
        return plans[-1]

    with vidtok.attach(model, visual=method) as handle:
        assert handle.report().samples == []
        tiny.generate(model, inputs, steps=4)
        report = handle.report()
    assert [(s.row, s.kind) for s in report.samples] == [(0, "video"), (1, "video"), (1, "video"), (2, "video")]
    whole = ops.plan_apply(plans[0], seen[0])
    start_in = start_out = 0
    for sample in report.samples:
        t, h, w = sample.grid_thw
        assert sample.tokens_in == t * h * w == sample.plan.num_in
        assert sample.tokens_out == sample.plan.num_out
        sample.plan.validate()
        mine = ops.plan_apply(sample.plan, seen[0][start_in : start_in + sample.tokens_in].contiguous())
        assert torch.equal(mine, whole[start_out : start_out + sample.tokens_out])
        cells = sample.plan.trace([sample.grid_thw])
        assert len(cells) == sample.tokens_out
        assert all(video == 0 and f < t and r < h and c < w for out in cells for video, f, r, c in out)
        start_in, start_out = start_in + sample.tokens_in, start_out + sample.tokens_out
    assert report.tokens_in == inputs["attention_mask"].sum(1).tolist()
    assert report.decode_steps == 3
    assert list(report.times) == ["vision", "decide", "move", "prefill", "decode"]
    assert all(seconds > 0 for seconds in report.times.values())
    assert "tokens" in str(report)


def test_report_of_an_identity_counts_time_too(models):
    model, inputs = models("qwen3_vl"), tiny.batch("qwen3_vl", tiny.ROWS[:1])
    with vidtok.attach(model, visual=tiny.keep_all) as handle:
        tiny.generate(model, inputs, steps=4)
        report = handle.report()
    assert report.tokens_in == report.tokens_out == [inputs["input_ids"].shape[1]]
    assert report.samples[0].tokens_in == report.samples[0].tokens_out
    assert {"vision", "prefill", "decode"} <= set(report.times)
    assert report.decode_steps == 3


def test_each_call_counts_its_own_time(models):
    model, inputs = models("qwen2_vl"), tiny.batch("qwen2_vl", tiny.ROWS[:1])
    with vidtok.attach(model, visual=tiny.drop) as handle:
        tiny.generate(model, inputs, steps=4)
        assert handle.report().decode_steps == 3
        tiny.generate(model, inputs, steps=2)
        assert handle.report().decode_steps == 1
        model(**inputs, use_cache=False)
        assert handle.report().decode_steps == 0
        assert "decode" not in handle.report().times
