"""Every side of every benchmark case agrees with the reference, at tiny shapes; nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from bench import gate
from bench.case import Case, Provider
from bench.suites import SUITES

CASES = [pytest.param(case, id=str(case)) for build in SUITES.values() for case in build(tiny=True)]


@pytest.mark.parametrize("case", CASES)
def test_sides_agree_with_the_reference(case: Case) -> None:
    inputs = case.make(0)
    wanted = gate.expected(case, inputs)
    for provider in (case.ours, *case.others):
        gate.check(case, provider, inputs, wanted)


@pytest.mark.parametrize("case", CASES)
def test_sides_leave_their_inputs_alone(case: Case) -> None:
    inputs = case.make(0)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "out"}
    for provider in (case.ours, *case.others):
        with torch.no_grad():
            provider.run(inputs)
        for name, value in before.items():
            assert torch.equal(inputs[name], value), (provider.label, name)


@pytest.mark.parametrize("case", CASES)
def test_work_is_known(case: Case) -> None:
    assert case.passes() and all(b > 0 and f >= 0 for b, f in case.passes())


def test_one_side_is_compiled() -> None:
    case = SUITES["topk_select"](tiny=True)[0]
    assert case.compiled is not None
    inputs = case.make(0)
    gate.check(case, case.compiled, inputs, gate.expected(case, inputs))


def test_every_case_has_its_own_name() -> None:
    names = [str(case) for build in SUITES.values() for case in build()]
    assert len(set(names)) == len(names)


def _broken(case: Case) -> Provider:
    """A side that gets one entry wrong."""

    def run(inputs: dict) -> tuple[torch.Tensor, ...]:
        wrong = [t.clone() for t in gate.expected(case, inputs)]
        wrong[0].view(-1)[0] += 1
        return tuple(wrong)

    return Provider("broken", "one entry off", run)


def test_gate_is_red_on_one_wrong_entry() -> None:
    case = SUITES["plan_apply"](tiny=True)[0]
    inputs = case.make(0)
    with pytest.raises(gate.GateError, match=r"one entry off .* differs from the reference"):
        gate.check(case, _broken(case), inputs, gate.expected(case, inputs))


def test_gate_is_red_on_another_shape() -> None:
    case = SUITES["plan_apply"](tiny=True)[0]
    inputs = case.make(0)
    short = Provider("broken", "one row short", lambda i: case.ours.run(i)[1:])
    with pytest.raises(gate.GateError, match="one row short"):
        gate.check(case, short, inputs, gate.expected(case, inputs))


def test_gate_sees_nan() -> None:
    wanted = torch.ones(4, 2)
    got = wanted.clone()
    got[2, 1] = torch.nan
    assert gate.share_differing(got, wanted) == 0.25
