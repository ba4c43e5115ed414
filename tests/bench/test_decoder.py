"""The measurement of a whole decoder: what it compares is the same work, and its tables say what its CSV holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import readme
from bench.decoder import __main__ as program
from bench.decoder.measure import Bench, ratios
from bench.decoder.memory import _scores
from bench.decoder.model import ATTENTION, TINY, UNIFORM, VISUAL, by_hand
from bench.row import context, read, write

SIZE = replace(TINY, layers=16, pairs=1, steps=1, calls=1)


@pytest.fixture(scope="module")
def bench():
    """A tiny decoder and its twin."""
    return Bench(SIZE, torch.device("cpu"), torch.float32, context(1))


def test_twins_share_their_weights(bench):
    for a, b in zip(bench.plain.parameters(), bench.other.parameters()):
        assert a is b
    with bench.attach(bench.other, decoder=UNIFORM), torch.no_grad():
        whole, reduced = bench.prefill(bench.plain), bench.prefill(bench.other)
    assert [c.past_key_values.layers[-1].keys.shape[2] for c in (whole, reduced)] == [168, 72]


@pytest.mark.parametrize("spec", [UNIFORM, ATTENTION])
def test_the_loop_by_hand_does_the_same(bench, spec):
    with bench.attach(bench.other, decoder=spec) as handle, torch.no_grad():
        expected = bench.prefill(bench.other).logits
        kept = bench.columns(handle.report())
        got = by_hand(bench.plain, bench.inputs["input_ids"], kept)()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        # Without its last gather it does not.
        kept.pop(max(kept))
        other = by_hand(bench.plain, bench.inputs["input_ids"], kept)()
        assert (other - expected).abs().max() > 1e-4


def test_rows_and_table(bench, tmp_path):
    with torch.no_grad():
        rows = [
            *bench.prefills(UNIFORM, hand=True, decoder=UNIFORM),
            *bench.prefills(VISUAL, visual=VISUAL),
            *bench.decode(),
            *bench.scoring(),
            *bench.overhead(UNIFORM, decoder=UNIFORM),
        ]
    assert len(rows) == 8
    assert all(row.metric == "model" and row.p20 <= row.p50 <= row.p80 for row in rows)
    path = tmp_path / "decoder.csv"
    write(rows, path)
    table = readme.decoder_table(read(path))
    assert len(table) == 2 + len(rows)
    assert rows[0].case in table[2]
    bench.size = replace(SIZE, tiny=False)
    goal = bench.row("x", "y", "×", (0.8, 0.85, 0.95), 3, bound=0.9, upper=False)
    assert (goal.target, goal.reached) == ("≥ 0.9", "no: 0.85")
    assert bench.row("x", "y", "%", (0.8, 0.85, 0.95), 3, bound=0.9).reached == "yes"
    bench.size = SIZE


def test_the_gate_notices_a_report_that_is_wrong(bench):
    with bench.attach(bench.other, decoder=UNIFORM) as handle, torch.no_grad():
        out = bench.prefill(bench.other)
        bench.gate(handle.report(), out)
        with pytest.raises(AssertionError, match="caches"):
            bench.gate(handle.report(), bench.prefill(bench.plain))


def test_scores_choose_a_share(bench):
    with torch.no_grad():
        kept = _scores(64, 64, torch.device("cpu"))()
    assert int(kept.mask.sum()) == 40 + int(0.3 * 64)
    assert kept.dropped == [64 - int(0.3 * 64)]


def test_pairs():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (1.0, 2.0, 3.0)


def test_arguments():
    args = program.parser().parse_args(["--tiny", "--threads", "1"])
    assert (args.tiny, args.device) == (True, "cpu")
