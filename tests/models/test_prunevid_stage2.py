"""PruneVid's second stage: attention decides after a layer, and the layers before forget too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from vidtok import methods
from vidtok.models import attach
from vidtok.models.drop import Drop
from vidtok.models.layers import Layers

LAYER, ALPHA, STEPS = 1, 0.4, 4
STAGE1 = {"tau": 0.6, "cluster_ratio": 0.5, "temporal_segment_ratio": 0.5}
SPEC = "prunevid:tau=0.6,cluster_ratio=0.5,temporal_segment_ratio=0.5"
DROP = Drop(f"attn_{LAYER}_{ALPHA}", preset="prunevid")
ROWS: list[list[tiny.Clip]] = [[("video", 8, 112)], [("video", 4, 56), ("video", 8, 84)], [("video", 6, 56)]]


@pytest.fixture(scope="module")
def made():
    models = {}

    def get(kind: str, attention: str = "eager") -> Any:
        if (kind, attention) not in models:
            models[kind, attention] = tiny.make(kind, attention, layers=4)
        return models[kind, attention]

    return get


class Reference:
    """One row, written from the description: masks instead of gathers, no cache, attention weights of the model."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.layers = Layers(model.model.language_model).modules
        self.groups: list[list[int]] = []

        def stage1(features: Tensor, grid_thw: Tensor) -> Any:
            plan = methods.prunevid(features, grid_thw, **STAGE1)
            names: dict[Any, list[int]] = {}
            for i, cells in enumerate(plan.trace(grid_thw)):
                frames = {frame for _, frame, _, _ in cells}
                # A static token covers all frames of its segment; a dynamic one lies in one.
                names.setdefault((cells[0][0], len(frames) > 1, min(frames)), []).append(i)
            self.groups = list(names.values())
            self.static = sum(len(group) for name, group in names.items() if name[1])
            return plan

        self.stage1 = stage1
        with attach(model, visual=stage1) as handle, torch.no_grad():
            share = model(**inputs, use_cache=False, output_attentions=True).attentions[LAYER][0]
            visual = self.visual_columns(handle, inputs, share.shape[-1])
        score = share[:, int(visual[-1]) + 1 :].amax((0, 1))
        self.dropped = torch.zeros(share.shape[-1], dtype=torch.bool)
        self.dropped[visual] = True
        for group in self.groups:
            columns = visual[group]
            best = score[columns].topk(int(len(group) * ALPHA)).indices
            self.dropped[columns[best]] = False
        self.prompt = share.shape[-1]

    @staticmethod
    def visual_columns(handle: Any, inputs: dict[str, Tensor], length: int) -> Tensor:
        """Columns of the reduced row with visual tokens: what is not text, in order."""
        columns, shift = [], 0
        ids = inputs["input_ids"][0].tolist()
        anchors: list[bool] = []
        for sample in handle.report().samples:
            kept = set(sample.plan.anchor.tolist())
            anchors += [i in kept for i in range(sample.tokens_in)]
        at = iter(anchors)
        for token in ids:
            if token != tiny.VIDEO:
                shift += 1
            elif next(at):
                columns.append(shift)
                shift += 1
        assert shift == length
        return torch.tensor(columns)

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """From the last prompt token on, of the prompt and the tokens after it."""
        length = self.prompt + inputs["input_ids"].shape[1] - self.fed
        low = torch.finfo(torch.float32).min
        causal = torch.full((length, length), low).triu(1)
        early, late = causal.clone(), causal.clone()
        dropped = torch.cat([self.dropped, torch.zeros(length - self.prompt, dtype=torch.bool)])
        early[self.prompt :, dropped] = low
        late[:, dropped] = low
        handles = []
        for i, layer in enumerate(self.layers):
            mask = (early if i <= LAYER else late)[None, None]
            handles.append(
                layer.register_forward_pre_hook(
                    lambda m, a, k, mask=mask: (a, {**k, "attention_mask": mask}), with_kwargs=True
                )
            )
        with attach(self.model, visual=self.stage1), torch.no_grad():
            out = self.model(**inputs, use_cache=False).logits[0, self.prompt - 1 :]
        for handle in handles:
            handle.remove()
        return out

    def run(self, inputs: dict[str, Tensor], more: Tensor) -> Tensor:
        self.fed = inputs["input_ids"].shape[1]
        grown = dict(inputs)
        grown["input_ids"] = torch.cat([inputs["input_ids"], more[None]], 1)
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                fill = torch.full_like(more, int(name == "attention_mask"))[None].to(inputs[name].dtype)
                grown[name] = torch.cat([inputs[name], fill], 1)
        return self.logits(grown)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_batch_with_cache_equals_masks_written_by_hand(kind, attention, made):
    model, plain = made(kind, attention), made(kind)
    inputs = tiny.batch(kind, ROWS)
    with attach(model, visual=SPEC, decoder=DROP) as handle:
        got, out = tiny.generate(model, inputs, STEPS)
        report = handle.report()
    held = [int(layer.keys.shape[-2]) for layer in out.past_key_values.layers]
    assert {x - STEPS + 1 for x in held} == {x.kv_length for x in report.layers}, "all layers hold the same"
    assert len(set(held)) == 1
    static = []
    for i in range(len(ROWS)):
        row = tiny.row(inputs, ROWS, i)
        reference = Reference(plain, row)
        static.append((reference.static, sum(map(len, reference.groups))))
        more = out.sequences[i, -STEPS:-1]
        want = reference.run(row, more)
        assert int(reference.dropped.sum()) > 0
        torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        kept = sum(int(len(g) * ALPHA) for g in reference.groups)
        ours = sum(s.at(LAYER + 1).num_out for s in report.samples if s.row == i)
        assert ours == kept
    assert any(0 < some < whole for some, whole in static), "static and dynamic groups"


def test_what_early_layers_forget_changes_decoding(made):
    model = made("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", ROWS)
    with attach(model, visual=SPEC, decoder=DROP):
        got, out = tiny.generate(model, inputs, STEPS)
    keep = Drop(f"attn_{LAYER}_{ALPHA}", preset="prunevid", compress=False)
    with attach(model, visual=SPEC, decoder=keep):
        other, _ = tiny.generate(model, inputs, STEPS)
    assert torch.equal(got[:, 0], other[:, 0]), "the prompt is read alike"
    assert (got[:, 1:] - other[:, 1:]).abs().max() > 1e-3
    logical = inputs["input_ids"].shape[1] + STEPS - 1
    assert out.past_key_values.get_seq_length() == logical
    assert out.past_key_values.get_query_offset() < logical


def test_without_stage_1_every_frame_is_a_group(made):
    model = made("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", ROWS)
    with attach(model, decoder=DROP) as handle:
        tiny.generate(model, inputs, 2)
        for sample in handle.report().samples:
            t, h, w = sample.grid_thw
            assert sample.at(LAYER).num_out == t * h * w
            assert sample.at(LAYER + 1).num_out == t * int(h * w * ALPHA)


def test_a_second_turn_and_beams_continue_what_is_left(made):
    model = made("qwen2_5_vl", "sdpa")
    inputs = tiny.row(tiny.batch("qwen2_5_vl", ROWS), ROWS, 0)
    with attach(model, visual=SPEC, decoder=DROP):
        got, out = tiny.generate(model, inputs, 6)
        first, turn = tiny.generate(model, inputs, 3)
        assert torch.equal(first, got[:, :3])
        ids = out.sequences[:, : inputs["input_ids"].shape[1] + 3]
        rest = {k: v for k, v in inputs.items() if k in ("mm_token_type_ids",)}
        rest = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in rest.items()}
        again, _ = tiny.generate(
            model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}, 3,
            past_key_values=turn.past_key_values,
        )  # fmt: skip
        torch.testing.assert_close(again, got[:, 3:], rtol=1e-4, atol=1e-3)
        beams = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=4)
        assert beams.shape[1] == inputs["input_ids"].shape[1] + 4


def test_a_call_that_makes_its_own_cache_is_compressed_too(made):
    model = made("qwen2_5_vl", "sdpa")
    inputs = tiny.batch("qwen2_5_vl", ROWS)
    with attach(model, visual=SPEC, decoder=DROP) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert {layer.keys.shape[-2] for layer in cache.layers} == {x.kv_length for x in handle.report().layers}


def test_what_cannot_be_compressed_is_refused(made):
    model = made("qwen2_5_vl", "sdpa")
    inputs = tiny.batch("qwen2_5_vl", ROWS)
    with attach(model, decoder=DROP), pytest.raises(ValueError, match="expected a cache that grows"):
        tiny.generate(model, inputs, 2, cache_implementation="static")
    with pytest.raises(ValueError, match="expected position='keep' with compress=True"):
        attach(model, decoder=DROP, position="renumber")
    with pytest.raises(ValueError, match="a layer from 0 to 2 of the model's 4, got 3"):
        attach(model, decoder=Drop("attn_3_0.4", preset="prunevid"))
    before = tiny.generate(model, inputs, 2)[0]
    with attach(model, decoder=DROP):
        tiny.generate(model, inputs, 2)
    assert torch.equal(before, tiny.generate(model, inputs, 2)[0])
