"""The language-model-input hook gives the same logits however the same reduced prompt is run."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.models import tiny

torch.set_num_threads(1)
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(kind, attention="sdpa"):
        if (kind, attention) not in made:
            made[kind, attention] = tiny.make(kind, attention)
        return made[kind, attention]

    return get


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
            alone, _ = tiny.generate(model, row(kind, i))
            torch.testing.assert_close(cached[i : i + 1], alone, **CLOSE)
    assert (cached - plain)[:, 0].abs().amax(-1).min() > 1e-2


def row(kind, i):
    """Row ``i`` of the shared batch without its padding."""
    whole = tiny.batch(kind, tiny.ROWS)
    real = whole["attention_mask"][i].bool()
    first = sum(len(c) for c in tiny.ROWS[:i])
    grids = whole["video_grid_thw"]
    sizes = grids.prod(-1).tolist()
    count = len(tiny.ROWS[i])
    start = sum(sizes[:first])
    out = {k: whole[k][i : i + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids") if k in whole}
    out["video_grid_thw"] = grids[first : first + count]
    out["pixel_values_videos"] = whole["pixel_values_videos"][start : start + sum(sizes[first : first + count])]
    return out
