"""The measurement of a whole vision tower: what it compares is the same work, and its tables say what its CSV holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vidtok
from bench import readme
from bench.baselines import tome
from bench.row import context, read, write
from bench.vision import __main__ as program
from bench.vision import stop
from bench.vision.measure import Case, Rows, compared, gate, measure, rounds
from bench.vision.memory import step_bytes
from bench.vision.model import BASE, LARGE, TINY, build, images, twin

CPU = torch.device("cpu")
CASE = Case(TINY, 2, "fp32", 0.01, (0, 8))


@pytest.fixture(scope="module")
def tower():
    """A tiny tower and its input."""
    return build(TINY, CPU, torch.float32), images(TINY, 2, CPU, torch.float32)


def test_ideals_are_those_of_the_published_schedule():
    assert [round(BASE.ideal(r), 2) for r in (0, 4, 8, 13, 16)] == [1, 1.15, 1.34, 1.69, 2.0]
    assert (BASE.tokens, LARGE.tokens) == (197, 577)
    assert sum(BASE.merges(16)) == 197 - 11


@pytest.mark.parametrize("r", [0, 8])
def test_operations_are_those_of_the_tower(tower, r):
    model, pixels = twin(tower[0]), tower[1]
    counter = FlopCounterMode(display=False)
    with vidtok.attach(model, vision=f"tome:r={r}"), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(pixels)
    assert counter.get_total_flops() == 2 * TINY.flops(r)


@pytest.mark.parametrize("fused", [False, True])
def test_the_published_form_does_the_same(tower, fused, monkeypatch):
    plain, pixels = tower
    model = twin(plain)
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters()))
    with vidtok.attach(model, vision="tome:r=8"), torch.no_grad():
        ours = model(pixels).pooler_output
        torch.testing.assert_close(tome.tower(plain, pixels, 8, fused), ours, rtol=1e-4, atol=1e-4)
        # Without its sizes it does not.
        attention = tome.attention
        monkeypatch.setattr(tome, "attention", lambda module, x, size, fused: attention(module, x, None, fused))
        assert (tome.tower(plain, pixels, 8, fused) - ours).abs().max() > 1e-3


def test_the_gate_notices_what_did_not_merge(tower):
    plain, pixels = tower
    model = twin(plain)
    with vidtok.attach(model, vision="tome:r=8") as handle, torch.no_grad():
        sides = {
            "vidtok 8": lambda: model(pixels).pooler_output,
            "published 8": lambda: tome.tower(plain, pixels, 8),
        }
        gate(CASE, sides, {8: handle}, 8)
        with pytest.raises(AssertionError, match="cosine"):
            gate(CASE, {**sides, "published 8": lambda: -tome.tower(plain, pixels, 8)}, {8: handle}, 8)
        with pytest.raises(AssertionError, match="sizes"):
            gate(CASE, sides | {"vidtok 4": sides["vidtok 8"], "published 4": sides["published 8"]}, {4: handle}, 4)


def test_rows_and_table(tmp_path):
    rows = Rows(context(1), tiny=True)
    found = measure(CASE, rows, CPU)
    assert [row.label for row in found] == [
        "speed-up", "speed-up", "of the ideal", "over published", "over careful", "over channel",
        "of cutting",
    ]  # fmt: skip
    found.append(rows.row("training", "saved for backward", "of plain", (0.5,) * 3, 1))
    found.append(rows.row("training", "peak of a step", "of plain", (0.4,) * 3, 1))
    path = tmp_path / "vision.csv"
    write(found, path)
    table = readme.vision_table(read(path))
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| tiny, batch 2, fp32, r=0", "| tiny, batch 2, fp32, r=8"]
    assert table[-1].startswith("| training | 0.5 | 0.4 |")


def test_targets():
    rows = Rows(context(1), tiny=False)
    times = {"plain": [2.0] * 3, "vidtok 8": [1.6] * 3, "published 8": [1.7] * 3}
    found = {row.label: row for row in compared(replace(CASE, shape=BASE), 8, times, rows)}
    assert found["speed-up"].reached == "yes"
    assert (found["of the ideal"].target, found["of the ideal"].reached) == ("≥ 0.92", "yes")
    assert (found["over published"].target, found["over published"].reached) == ("≥ 1.15", "no: 1.06")
    assert found["speed-up"].speedup == pytest.approx(BASE.ideal(8))


def test_cutting_does_the_operations_of_merging(tower):
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        tome.cut(*tower, 8)
    assert counter.get_total_flops() == 2 * TINY.flops(8)


def test_operations_of_stop_are_those_of_its_published_form():
    video = replace(stop.TINY, batch=1)
    model, pixels = stop.build(video), torch.randn(1, 3, 3, 64, 64)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        stop.published(model, pixels)
    head = 2 * video.width * model.sizes.embed
    assert counter.get_total_flops() == 2 * stop.macs(video, 0) + head
    # Published: 67.7 GMAC, and 1.28 and 1.77 times fewer.
    whole = stop.macs(stop.CASES[0], 0)
    assert round(whole / 1e9, 1) == 67.7
    assert [round(whole / stop.macs(stop.CASES[0], r), 2) for r in (2, 4, 8)] == [1.28, 1.77, 2.77]


def test_rows_of_stop():
    found = stop.measure(stop.TINY, Rows(context(1), tiny=True), CPU)
    assert [row.label for row in found if row.case.endswith("r=4")] == ["speed-up", "of the ideal", "over published"]
    assert found[0].label == "over published"


def test_rounds_end_with_the_budget():
    calls = []
    times = rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, CPU, (2, 9))
    assert calls == ["a", "b", "b", "a"]
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}


def test_merging_keeps_less_for_the_backward_pass():
    whole, merged = step_bytes(TINY, 2, 0, CPU)[0], step_bytes(TINY, 2, 8, CPU)[0]
    assert merged / whole < 1.1 * TINY.mlp_tokens(8) / TINY.mlp_tokens(0)


def test_arguments():
    args = program.parser().parse_args(["--tiny", "--threads", "1"])
    assert (args.tiny, args.device) == (True, "cpu")
    assert all(case.batch in (1, 8) for case in program.CASES)
