"""Microseconds of Python per call, on tensors too small to take time themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.row import Row
from vidtok import ops
from vidtok.plan import Plan

TARGETS = {"one output": 5.0, "a further output": 1.5, "a Plan": 1.0}


def per_call(run: Callable[[], Any], calls: int = 2000, repeats: int = 15) -> list[float]:
    """Microseconds per call of each repeat, ascending, by the thread's own time."""
    for _ in range(200):
        run()
    out = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        for _ in range(calls):
            run()
        out.append((time.thread_time_ns() - start) * 1e-3 / calls)
    return sorted(out)


def measure(calls: int = 2000, repeats: int = 15) -> dict[str, list[float]]:
    """One output, one further output, and a Plan; under no_grad, as ``generate()`` runs."""
    plan = Plan.gather(torch.tensor([0, 2]), torch.tensor([0, 4]), torch.tensor([0, 2]), 4)
    x = torch.zeros(4, 8)
    rows = [torch.zeros(4, dtype=torch.int64) for _ in range(5)]
    ends, anchor = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    with torch.no_grad():
        one = per_call(lambda: ops.plan_apply(plan, x), calls, repeats)
        first = per_call(lambda: ops.position_remap(plan, rows[0]), calls, repeats)
        five = per_call(lambda: ops.position_remap(plan, *rows), calls, repeats)
        made = per_call(lambda: Plan(ends, ends, anchor, None, None, None, 4, 4, 2), calls, repeats)
    further = [(b - a) / 4 for a, b in zip(first, five)]
    return {"one output": one, "a further output": further, "a Plan": made}


def rows(shared: dict[str, Any]) -> list[Row]:
    """The table of call overheads."""
    labels = {"one output": "plan_apply", "a further output": "position_remap", "a Plan": "Plan(...)"}
    out = []
    for name, times in measure().items():
        best, bound = times[0], TARGETS[name]
        reached = "yes" if best <= bound else f"no: {best:.2f} against ≤ {bound:g} µs"
        print(f"  Python for {name}: {best:.2f} µs (at most {bound:g})")
        p20, p50, p80 = (times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        out.append(
            Row(
                "overhead",
                "µs",
                "call",
                name,
                "",
                "vidtok",
                labels[name],
                p20,
                p50,
                p80,
                len(times),
                target=f"≤ {bound:g} µs",
                reached=reached,
                **shared,
            )
        )
    return out
