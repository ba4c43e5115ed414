"""Times every side of a case and its limit in one loop, so that each ratio compares neighbours in time."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import clock, gate
from bench.case import Case, Inputs, Provider, clone, nbytes
from bench.limits import Limits, cold_bytes
from bench.row import Row

COLD_SECONDS, HOT_SECONDS = 2.5, 0.5
MOST_SETS = 4096
# Limit samples also push code out of the cache. Data is meant to be cold, code is not: before a sample this short,
# the same call runs once on the set before it.
SHORT_SECONDS = 2e-3
UNITS = {"limit": " × limit", "us": " µs"}
# faiss brings a thread pool of its own, which spins for a while after each call.
SETTLE_SECONDS = 0.02


@dataclass
class Budget:
    """Seconds for one case, shared by its sides; no side gets fewer than ``least`` samples."""

    cold: float = COLD_SECONDS
    hot: float = HOT_SECONDS
    least: int = 3
    most: int = 400


def _timed(run: Callable[[Inputs], Any], inputs: Inputs) -> tuple[float, Any]:
    start = clock.now()
    result = run(inputs)
    return (clock.now() - start) * 1e-9, result


def rotation(case: Case, inputs: Inputs, result: Any) -> list[Inputs]:
    """Enough copies of the inputs that, with their results, they leave the cache before they come again."""
    each = nbytes(inputs) + nbytes(result)
    wanted = 1 if each > 2 * cold_bytes() else max(2, min(MOST_SETS, -(-cold_bytes() // max(each, 1))))
    return [inputs, *(clone(inputs) for _ in range(wanted - 1))]


class _Side:
    """One provider with its own results, kept so that outputs rotate as the inputs do."""

    def __init__(self, provider: Provider, sets: int) -> None:
        self.provider = provider
        self.results: list[Any] = [None] * sets
        self.seconds: list[float] = []

    def sample(self, sets: list[Inputs], at: int) -> float:
        at %= len(sets)
        self.results[at] = None
        seconds, self.results[at] = _timed(self.provider.run, sets[at])
        if self.provider.role == "faiss":
            time.sleep(SETTLE_SECONDS)
        return seconds


def _warm(sides: list[_Side], sets: list[Inputs]) -> dict[str, float]:
    """First calls, and a rough time of each side."""
    rough = {}
    for side in sides:
        side.sample(sets, 0)
        rough[side.provider.role] = side.sample(sets, 1)
        for at in range(2, len(sets)):
            if at * rough[side.provider.role] > 0.2:
                break
            side.sample(sets, at)
    return rough


def _loop(
    case: Case, sides: list[_Side], sets: list[Inputs], limits: Limits | None, seconds: float, budget: Budget
) -> dict[str, list[tuple[int, float]]]:
    """(iteration, seconds) of each role; the limit under ``limit``."""
    rough, work = _warm(sides, sets), case.passes()
    out: dict[str, list[tuple[int, float]]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    share = seconds / len(sides)
    needs_flops = limits is not None and any(f > 0 for _, f in work)
    # A long operator is compared with limit samples that are not much shorter than itself.
    repeats = max(1, min(16, round(rough["vidtok"] / 8e-3)))
    at = 0
    for i in range(budget.most):
        left = 0
        for side in sides:
            role = side.provider.role
            if i >= budget.least and spent[role] + rough[role] > share:
                continue
            left += 1
            if rough[role] < SHORT_SECONDS and limits is not None:
                side.sample(sets, at)
                at += 1
            sample = side.sample(sets, at)
            at += 1
            out[role].append((i, sample))
            spent[role] += sample
            if role == "vidtok" and limits is not None:
                copy = statistics.median(limits.copy() for _ in range(repeats))
                flops = statistics.median(limits.flops() for _ in range(repeats)) if needs_flops else 1.0
                out["limit"].append((i, limits.seconds(work, copy, flops)))
        if left == 0:
            break
    return out


def _pairs(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> float:
    """Median of a/b over the iterations that hold both."""
    other = dict(b)
    return statistics.median(x / other[i] for i, x in a if i in other)


def _quantiles(samples: list[tuple[int, float]]) -> tuple[float, float, float]:
    times = sorted(1e6 * s for _, s in samples)
    return tuple(times[min(len(times) - 1, round(q * (len(times) - 1)))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def _reached(case: Case, over_limit: float | None, p50: float, speedups: dict[str, float]) -> str:
    missed = []
    for target in case.targets:
        value = {"limit": over_limit, "us": p50}.get(target.against, speedups.get(target.against))
        if value is None:
            missed.append(f"{target.against} not measured")
        elif (value > target.bound) if target.upper else (value < target.bound):
            missed.append(f"{value:.2f}{UNITS.get(target.against, '× ' + target.against)}")
    return "yes" if case.targets and not missed else ("no: " + "; ".join(missed) if missed else "")


def measure(
    case: Case,
    limits: Limits,
    shared: dict[str, Any],
    budget: Budget | None = None,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Gate every side of a case, then time them: rows for the cold and the hot cache."""
    budget = budget or Budget()
    inputs = case.make(0)
    wanted = gate.expected(case, inputs)
    providers = [case.ours, *case.others, *([case.compiled] if case.compiled else [])]
    for provider in list(providers):
        start = time.perf_counter()
        try:
            gate.check(case, provider, inputs, wanted)
        except torch._dynamo.exc.TorchDynamoException as error:
            log(f"    torch.compile cannot: {str(error).splitlines()[0]}")
            providers.remove(provider)
            continue
        if provider.role == "compile":
            log(f"    compiled in {time.perf_counter() - start:.1f} s")
    rows = []
    with torch.no_grad():
        result = case.ours.run(inputs)
        sets = rotation(case, inputs, result)
        del result
        for cache, seconds in (("cold", budget.cold), ("hot", budget.hot)):
            used = sets if cache == "cold" else sets[:1]
            sides = [_Side(p, len(used)) for p in providers]
            gc.collect()
            gc.disable()
            try:
                samples = _loop(case, sides, used, limits if cache == "cold" else None, seconds, budget)
            finally:
                gc.enable()
            del sides
            if cache == "cold":
                limit = samples["limit"]
                least = statistics.median(s for _, s in limit)
            rows += _rows(case, cache, providers, samples, limit, least, limits, shared)
    return rows


def _rows(
    case: Case,
    cache: str,
    providers: list[Provider],
    samples: dict[str, list[tuple[int, float]]],
    limit: list[tuple[int, float]],
    least: float,
    limits: Limits,
    shared: dict[str, Any],
) -> list[Row]:
    ours, work = samples["vidtok"], case.passes()
    speedups = {p.role: _pairs(samples[p.role], ours) for p in providers}
    target = ", ".join(map(str, case.targets))
    rows = []
    for p in providers:
        p20, p50, p80 = _quantiles(samples[p.role])
        if cache == "cold":
            over = _pairs(samples[p.role], limit)
        else:
            over = p50 * 1e-6 / least if least else None
        mine = p.role == "vidtok" and cache == "cold"
        rows.append(
            Row(
                "time",
                "µs",
                case.operator,
                case.name,
                cache,
                p.role,
                p.label,
                p20,
                p50,
                p80,
                len(samples[p.role]),
                least * 1e6,
                limits.kind(work),
                over,
                speedups[p.role],
                sum(b for b, _ in work),
                sum(f for _, f in work),
                target if mine else "",
                _reached(case, over, p50, speedups) if mine else "",
                **shared,
            )
        )
    return rows
