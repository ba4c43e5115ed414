"""flash_attention_2 on the CPU: transformers' own code drives a stand-in for the package."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import vidtok
from tests.models import flash, tiny
from tests.models.test_zoo import NAMES, family
from vidtok.models.visual import InputHook

CLOSE = {"rtol": 0, "atol": 2e-5}
TEXT = torch.arange(20, 27)[None]


@pytest.fixture
def calls():
    """flash_attention_2 works during the test; what was called is recorded."""
    with flash.installed() as record:
        yield record


@pytest.fixture(scope="module")
def pairs():
    """The same random weights under sdpa and under flash attention."""
    made = {}

    def get(kind):
        if kind not in made:
            with flash.installed():
                made[kind] = tiny.make(kind, "flash_attention_2"), tiny.make(kind, "sdpa")
        return made[kind]

    return get


# ---------------------------------------------------------------------- the stand-in
def reference(q, k, v, *, causal, window=(-1, -1), softcap=0.0, scale=None):
    """Attention of one sequence from its formula, element by element."""
    repeats, shift = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = {}
            for j in range(k.shape[0]):
                away = j - (i + shift)
                if (
                    (causal and away > 0)
                    or (window[0] >= 0 and -away > window[0])
                    or (window[1] >= 0 and away > window[1])
                ):
                    continue
                s = float(q[i, h] @ k[j, h // repeats]) * (q.shape[-1] ** -0.5 if scale is None else scale)
                scores[j] = softcap * math.tanh(s / softcap) if softcap else s
            total = sum(math.exp(s) for s in scores.values())
            for j, s in scores.items():
                out[i, h] += math.exp(s) / total * v[j, h // repeats]
    return out


@pytest.mark.parametrize("queries", [5, 2, 7])
@pytest.mark.parametrize(
    "options", [{}, {"window": (2, 1)}, {"softcap": 2.0}, {"scale": 0.3}, {"window": (1, 1), "softcap": 1.5}]
)
@pytest.mark.parametrize("causal", [True, False])
def test_dense_equals_the_formula(queries, options, causal):
    torch.manual_seed(queries)
    q, k, v = torch.randn(1, queries, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    named = {"window": "window_size", "scale": "softmax_scale", "softcap": "softcap"}
    got = flash.flash_attn_func(q, k, v, causal=causal, **{named[n]: x for n, x in options.items()})
    torch.testing.assert_close(got[0], reference(q[0], k[0], v[0], causal=causal, **options), rtol=0, atol=1e-6)


def test_varlen_equals_dense_per_sequence():
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 2, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 6, 7, 12])
    got = flash.flash_attn_varlen_func(q, k, v, cu_q.int(), cu_k.int(), 5, 6, causal=True)
    for (a, b), (c, d) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):
        alone = flash.flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal=True)
        assert torch.equal(got[a:b], alone[0])
    with pytest.raises(AssertionError, match="at most 4"):
        flash.flash_attn_varlen_func(q, k, v, cu_q.int(), cu_k.int(), 4, 6)


def test_padding_round_trip():
    x, mask = torch.randn(2, 4, 3), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    packed, index, cu, longest, counts = flash.unpad_input(x, mask)
    assert cu.tolist() == [0, 3, 5] and longest == 3 and counts.tolist() == [3, 2]
    assert torch.equal(packed, flash.index_first_axis(x.flatten(0, 1), index))
    assert torch.equal(flash.pad_input(packed, index, 2, 4), x * mask[..., None])


def test_everything_is_put_back():
    from transformers import PreTrainedModel
    from transformers import modeling_flash_attention_utils as utils

    def look():
        names = [n for n in sys.modules if n.startswith("flash_attn")]
        places = [getattr(PreTrainedModel, n, None) for n in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch")]
        return names, places, utils.is_flash_attn_2_available, [getattr(utils, n, None) for n in flash._LOADED]

    before = look()
    with flash.installed():
        assert look() != before
        tiny.make("qwen2_vl", "flash_attention_2", layers=1)
    assert look() == before
    if not before[2]():
        with pytest.raises((ImportError, ValueError)):
            tiny.make("qwen2_vl", "flash_attention_2", layers=1)


# ---------------------------------------------------------------------- visual reduction
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_ragged_batches(pairs, calls, kind, side):
    fast, slow = pairs(kind)
    inputs = tiny.batch(kind, tiny.ROWS, side=side)
    with vidtok.attach(slow, visual="uniform:ratio=0.5"):
        right = slow(**inputs).logits
        alone = [slow(**tiny.row(inputs, tiny.ROWS, i)).logits[0] for i in range(3)]
    with vidtok.attach(fast, visual="uniform:ratio=0.5"):
        got = fast(**inputs).logits
        assert ("varlen", 3, True) in calls
        for i, row in enumerate(alone):
            torch.testing.assert_close(got[i, -len(row) :], row, **CLOSE)
            torch.testing.assert_close(right[i, -len(row) :], row, **CLOSE)
            one = fast(**tiny.row(inputs, tiny.ROWS, i)).logits[0]
            torch.testing.assert_close(one, row, **CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_generation(pairs, calls, kind, rows):
    fast, slow = pairs(kind)
    inputs = tiny.batch(kind, tiny.ROWS[:rows])
    with vidtok.attach(slow, visual="uniform:ratio=0.5"):
        right, _ = tiny.generate(slow, inputs)
    plain, _ = tiny.generate(fast, inputs)
    assert not torch.allclose(plain, right, atol=1e-2)
    with vidtok.attach(fast, visual="uniform:ratio=0.5"):
        cached, _ = tiny.generate(fast, inputs)
        uncached, _ = tiny.generate(fast, inputs, use_cache=False)
    torch.testing.assert_close(cached, right, **CLOSE)
    torch.testing.assert_close(uncached, right, **CLOSE)


def second_turn(model, kind):
    """Logits of a turn that brings another video to the returned cache."""
    first, later = tiny.batch(kind, tiny.ROWS[:1]), tiny.batch(kind, [[("video", 4, 84)]], seed=30)
    out = model(**first, use_cache=True)
    flash.calls.clear()
    length = first["input_ids"].shape[1]
    later["attention_mask"] = torch.ones(1, length + later["input_ids"].shape[1], dtype=torch.long)
    one = model.model.get_rope_index(**{
        n: later[n] if n != "attention_mask" else None
        for n in ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
        if n in later
    })[0]  # fmt: skip
    four = torch.cat([torch.arange(one.shape[-1])[None, None], one])
    return model(**later, position_ids=four + length, past_key_values=out.past_key_values).logits


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_video_in_the_second_turn_is_one_sequence(pairs, calls, kind, monkeypatch):
    """Gaps in the row of text positions would be taken for packed rows, whose keys are those of the turn alone."""
    fast, slow = pairs(kind)
    with vidtok.attach(slow, visual="uniform:ratio=0.5"):
        right = second_turn(slow, kind)
    with vidtok.attach(fast, visual="uniform:ratio=0.5"):
        torch.testing.assert_close(second_turn(fast, kind), right, **CLOSE)
        assert not {c for c in calls if c[0] == "varlen" and c[2]}
        keep = InputHook._positions

        def gapped(self, position, rows, number):
            first = position[:1].gather(-1, rows.anchor.long()[None, None])
            return torch.cat([first, keep(self, position, rows, number)[1:]])

        monkeypatch.setattr(InputHook, "_positions", gapped)
        try:
            wrong = second_turn(fast, kind)
        except RuntimeError:  # 4.57 looks for position 0, and this turn has none
            return
        assert {c for c in calls if c[0] == "varlen" and c[2]}
        assert not torch.allclose(wrong, right, atol=1e-2)


LINES = [n for n in ("llava_onevision", "llava_next_video", "internvl", "perception_lm", "video_llama_3") if n in NAMES]


def second_turn_of_one_row(model, name):
    """The same for a family with one row of positions, which counts on from the cache."""
    module = family(name)
    first, later = module.batch(module.ROWS[:1]), module.batch(module.ROWS[2:], seed=30)
    out = model(**first, use_cache=True)
    flash.calls.clear()
    length = first["input_ids"].shape[1]
    later["attention_mask"] = torch.ones(1, length + later["input_ids"].shape[1], dtype=torch.long)
    return model(**later, past_key_values=out.past_key_values).logits


@pytest.mark.parametrize("name", LINES)
def test_kept_positions_of_one_row_stay_out_of_the_layers(calls, name, monkeypatch):
    """Layers that were given the positions which tokens keep would take their gaps for borders of packed rows."""
    fast, slow = family(name).make("flash_attention_2"), family(name).make("sdpa")
    with vidtok.attach(slow, visual="uniform:ratio=0.5"):
        right = second_turn_of_one_row(slow, name)
    with vidtok.attach(fast, visual="uniform:ratio=0.5"):
        torch.testing.assert_close(second_turn_of_one_row(fast, name), right, **CLOSE)
        assert not {c for c in calls if c[0] == "varlen" and c[2]}
        place = InputHook._place

        def gapped(self, call, changed, *rest):
            place(self, call, changed, *rest)
            changed["position_ids"] = call.rotary

        monkeypatch.setattr(InputHook, "_place", gapped)
        try:
            wrong = second_turn_of_one_row(fast, name)
        except RuntimeError:  # 4.57 looks for position 0, and this turn has none
            return
        assert {c for c in calls if c[0] == "varlen" and c[2]}
        assert not torch.allclose(wrong, right, atol=1e-2)
