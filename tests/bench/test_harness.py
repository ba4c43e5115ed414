"""The harness on tiny cases: rows, ratios, rotation. Speed is never asserted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import harness
from bench.case import Case, Provider, Target
from bench.gate import GateError
from bench.harness import Budget, measure, rotation
from bench.limits import Limits, cold_bytes
from bench.row import Row, read, write
from bench.suites import SUITES

SHARED = {"threads": 1, "isa": "x", "machine": "m", "versions": "v", "commit": "c", "timestamp": "2000-01-01"}


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits(1, samples=2)


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(harness, "MOST_SETS", 4)
    return replace(SUITES["plan_apply_mean"](tiny=True)[0], compiled=None)


def run(case: Case, limits: Limits) -> list[Row]:
    return measure(case, limits, SHARED, Budget(cold=0.02, hot=0.02, least=2, most=4), log=lambda text: None)


def test_rows_of_one_case(case: Case, limits: Limits) -> None:
    rows = run(case, limits)
    assert [(r.cache, r.role) for r in rows] == [
        (c, r) for c in ("cold", "hot") for r in ("vidtok", "eager", "careful")
    ]
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.samples >= 2 and row.limit and row.limit > 0 and row.over_limit and row.speedup
        assert (row.speedup == 1) == (row.role == "vidtok")
        assert bool(row.target) == (row.role == "vidtok" and row.cache == "cold")


def test_nothing_is_timed_on_red(case: Case, limits: Limits) -> None:
    calls = []

    def wrong(inputs: dict) -> torch.Tensor:
        calls.append(1)
        return case.ours.run(inputs) + 1

    red = replace(case, others=(Provider("eager", "wrong", wrong),))
    with pytest.raises(GateError):
        run(red, limits)
    assert len(calls) == 1


def test_targets_are_judged(case: Case, limits: Limits) -> None:
    easy = replace(case, targets=(Target("limit", 1e9), Target("us", 1e9), Target("eager", 1e-9)))
    assert run(easy, limits)[0].reached == "yes"
    hard = replace(case, targets=(Target("limit", 1e-9), Target("eager", 1e9), Target("compile", 2)))
    reached = run(hard, limits)[0].reached
    assert (
        reached.startswith("no: ")
        and "compile not measured" in reached
        and "× eager" in reached
        and "× limit" in reached
    )


def test_rotation_exceeds_the_cache() -> None:
    big = SUITES["plan_apply"](tiny=True)[0]
    inputs = {"x": torch.zeros(1 << 20)}
    sets = rotation(big, inputs, None)
    assert len(sets) * (4 << 20) >= cold_bytes()
    assert len({s["x"].data_ptr() for s in sets}) == len(sets)


def test_limit_is_the_larger_share(limits: Limits) -> None:
    assert limits.seconds(((100.0, 10.0),), 10.0, 10.0) == 10.0
    assert limits.seconds(((10.0, 100.0), (50.0, 0.0)), 10.0, 10.0) == 15.0
    rates = [*limits.copy_rates.values(), *limits.flop_rates.values()]
    assert all(rate > 0 for rate in rates)
    assert limits.kind(((1e9, 0.0),)) == "bytes" and limits.kind(((1.0, 1e12),)) == "flops"


def test_rows_survive_the_csv(case: Case, limits: Limits, tmp_path) -> None:
    rows = run(case, limits)
    write(rows, tmp_path / "a.csv")
    back = read(tmp_path / "a.csv")
    assert len(back) == len(rows)
    for a, b in zip(rows, back):
        assert (a.operator, a.case, a.role, a.reached, a.samples) == (b.operator, b.case, b.role, b.reached, b.samples)
        assert b.p50 == pytest.approx(a.p50, rel=1e-5)
