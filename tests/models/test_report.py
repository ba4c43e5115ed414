"""What a handle reports is what was executed."""

from __future__ import annotations

import copy

import pytest
import torch

import vidtok
from tests.models import tiny
from tests.models.test_zoo import TAKEN, family
from vidtok import ops
from vidtok.models.report import Report

DECODER = "uni_1_0.5-attn_3_0.25"


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


# ---------------------------------------------------------------------- inside the decoder
def through(model, first):
    """A copy whose layers before ``first`` pass their input on unchanged."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.language_model.layers[:first]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def seen_by(model, index, inputs):
    """Hidden states that enter layer ``index``, as the layer itself gets them."""
    found = []
    layer = model.model.language_model.layers[index]
    handle = layer.input_layernorm.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("visual", [None, tiny.drop, tiny.merge], ids=["alone", "drop", "merge"])
def test_one_plan_per_sample_says_what_each_layer_sees(visual):
    model = through(tiny.make("qwen2_5_vl", layers=5), 5)
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    whole = seen_by(model, 0, inputs)
    features = whole[inputs["input_ids"] == tiny.VIDEO]
    with vidtok.attach(model, visual=visual, decoder=DECODER) as handle:
        for index in range(5):
            hidden = seen_by(model, index, inputs)
            report = handle.report()
            assert [[n for n, _ in s.stages] for s in report.samples] == [[1, 3]] * 4
            start = [0] * 3
            first = 0
            for sample in report.samples:
                plan = sample.at(index)
                plan.validate()
                mine = features[first : first + sample.tokens_in].contiguous()
                expected = ops.plan_apply(plan, mine)
                row = hidden[sample.row]
                # Tokens of the row that equal what the plan says, in order.
                at = [
                    (start[sample.row] + torch.cdist(row[start[sample.row] :], token[None]).argmin()).item()
                    for token in expected
                ]
                assert at == sorted(set(at))
                torch.testing.assert_close(row[at], expected, rtol=0, atol=1e-5)
                start[sample.row] = at[-1] + 1
                first += sample.tokens_in
                t, h, w = sample.grid_thw
                cells = plan.trace([sample.grid_thw])
                assert all(f < t and r < h and c < w for out in cells for _, f, r, c in out)
            visible = hidden.shape[1] - min(report.layers[index].kv_length, hidden.shape[1])
            assert visible == 0


def test_layers_are_those_of_the_cache():
    model, inputs = tiny.make("qwen2_5_vl", layers=5), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with torch.no_grad():
        plain = model(**inputs, use_cache=True).past_key_values
        with vidtok.attach(model, visual=tiny.drop, decoder=DECODER) as handle:
            cache = model(**inputs, use_cache=True).past_key_values
            report = handle.report()
    assert [layer.kv_length for layer in report.layers] == [layer.keys.shape[2] for layer in cache.layers]
    size = [sum(x.keys.nbytes + x.values.nbytes for x in c.layers) for c in (cache, plain)]
    assert (report.kv_bytes, report.kv_bytes + report.kv_bytes_saved) == tuple(size)
    tokens = [layer.tokens for layer in report.layers]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) == 3
    assert tokens[0] == sum(report.tokens_out)
    left = [sum(s.at(i).num_out for s in report.samples) for i in range(5)]
    assert [tokens[0] - n for n in tokens] == [left[0] - n for n in left]
    assert 0 < report.flops < report.flops_whole
    assert report.layers[0].flops_whole == report.flops_whole // 5


def test_operations_of_a_row_by_the_formula():
    model, inputs = tiny.make("qwen2_vl", layers=2), tiny.batch("qwen2_vl", tiny.ROWS[:1])
    with vidtok.attach(model, decoder="uni_1_0.25") as handle, torch.no_grad():
        model(**inputs, use_cache=False)
        report = handle.report()
    n = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == tiny.VIDEO).sum())
    m = n - visual + visual // 4
    weights = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96  # q, o; k, v; gate, up, down
    expected = [2 * k * weights + 4 * 64 * k * (k + 1) // 2 for k in (n, m)]
    assert [layer.flops for layer in report.layers] == expected
    assert [layer.kv_bytes for layer in report.layers] == [k * 2 * 32 * 4 for k in (n, m)]


def test_a_second_turn_finds_the_first_in_the_cache():
    model, rows = tiny.make("qwen2_vl", layers=2), [[("video", 4, 56)]]
    inputs = tiny.batch("qwen2_vl", rows)
    with vidtok.attach(model, visual=tiny.drop) as handle, torch.no_grad():
        first = model(**inputs, use_cache=True)
        kept, whole = sum(handle.report().tokens_out), sum(handle.report().tokens_in)
        position = torch.arange(whole, 2 * whole).expand(3, 1, -1).clone()
        at = inputs["input_ids"][0] == tiny.VIDEO
        position[2, :, at] += torch.arange(int(at.sum()))
        mask = torch.ones(1, 2 * whole, dtype=torch.long)
        again = {**inputs, "attention_mask": mask, "position_ids": position}
        out = model(**again, past_key_values=first.past_key_values, use_cache=True)
        report = handle.report()
    assert (
        [x.kv_length for x in report.layers] == [x.keys.shape[2] for x in out.past_key_values.layers] == [2 * kept] * 2
    )
    assert report.kv_bytes_saved == 2 * 2 * (whole - kept) * 2 * 32 * 4
    weights = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96
    pairs = kept * kept + kept * (kept + 1) // 2
    assert report.layers[0].flops == 2 * kept * weights + 4 * 64 * pairs


def test_text_of_a_report():
    model, inputs = tiny.make("qwen2_5_vl", layers=5), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with vidtok.attach(model, visual=tiny.drop, decoder=DECODER) as handle:
        tiny.generate(model, inputs, steps=3)
        report = handle.report()
    text = str(report).splitlines()
    assert [line.split(":")[0] for line in text if line.startswith("layer")] == ["layer 0", "layers 1-2", "layers 3-4"]
    assert any(line.startswith("decoder: ") and "saved" in line for line in text)
    assert any(line == "row 0: video, 16 visual tokens from layer 1 on" for line in text)
    assert list(report.times) == ["vision", "decide", "move", "select", "prefill", "decode"]
    assert report.times["select"] < report.times["prefill"]
    assert report.decode_steps == 2
    assert str(Report()) == ""


@pytest.mark.parametrize("name", TAKEN)
def test_every_family_holds_what_is_reported(name):
    module = family(name)
    model, inputs = module.make(), module.batch(module.ROWS)
    with vidtok.attach(model, visual=tiny.drop) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        report = handle.report()
    assert report.layers
    assert 0 < report.flops < report.flops_whole
    held = [getattr(layer, "keys", None) for layer in cache.layers]
    size = 0
    for layer, keys, entry in zip(report.layers, held, cache.layers):
        if keys is None or not layer.kv_length:
            continue
        assert layer.kv_length == keys.shape[2], layer
        assert layer.kv_bytes == keys.nbytes + entry.values.nbytes, layer
        size += layer.kv_bytes
    assert report.kv_bytes == size
    # Keys that an indexer picks from are not counted.
    assert size > 0 or any(layer.kind == "indexed_attention" for layer in report.layers)


def test_a_cache_shortened_everywhere_is_reported_so():
    model, inputs = tiny.make("qwen2_5_vl", layers=5), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with (
        vidtok.attach(model, visual=tiny.drop, decoder=vidtok.Drop("attn_2_0.5", preset="prunevid")) as handle,
        torch.no_grad(),
    ):
        cache = model(**inputs, use_cache=True).past_key_values
        report = handle.report()
    assert [layer.kv_length for layer in report.layers] == [layer.keys.shape[2] for layer in cache.layers]
    assert len({layer.kv_length for layer in report.layers}) == 1
    assert [layer.tokens for layer in report.layers[:3]] == [sum(report.tokens_out)] * 3
    assert report.layers[3].tokens < report.layers[2].tokens
    assert report.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
