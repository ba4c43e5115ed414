"""Measuring candidates against the model: which to measure, what a table keeps, how well the ranks agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vidtok.kernels import tables
from vidtok.kernels.tables import Candidate, Entry, _files
from vidtok.kernels.tables._files import Table, key

Call = Callable[[], Any]
Timer = Callable[[Call], float]
Make = Callable[[str, Mapping[str, int], str], Call]
Notify = Callable[[str, int, int], None]

# Triton compiles every candidate, about a second each.
MOST = {"cuda": 24, "triton": 8}
MARGIN = 0.98  # the model's choice stays unless another is 2 % faster


class Task(NamedTuple):
    """One kernel to measure; what holds for its dtype is written for all of ``dtypes``."""

    backend: str
    op: str
    dtypes: tuple[str, ...]


class Sample(NamedTuple):
    """One measured candidate; times in seconds."""

    candidate: Candidate
    modelled: float
    measured: float


@dataclass
class Measured:
    """What was found: lines for the user's table, rank correlations, gains and what went wrong."""

    table: Table = field(default_factory=lambda: Table({}, {}))
    ranks: dict[tuple[str, str], list[tuple[float, int]]] = field(default_factory=dict)
    gains: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    left: list[Task] = field(default_factory=list)

    def correlation(self) -> dict[str, dict[str, dict[str, float]]]:
        """Per backend and operator: mean over shapes of the rank correlation of modelled and measured times."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (backend, op), found in self.ranks.items():
            whole = [(r, n) for r, n in found if r == r]
            if whole:
                mean = statistics.fmean(r for r, _ in whole)
                numbers = {"spearman": round(mean, 3), "shapes": len(whole), "candidates": sum(n for _, n in whole)}
                out.setdefault(backend, {})[op] = numbers
        return out


def short(error: object) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:160]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where one side does not vary."""

    def ranks(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        first = {v: i for i, v in reversed(list(enumerate(ordered)))}
        return [first[v] + (ordered.count(v) - 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    n = len(x)
    mean = (n - 1) / 2
    spread = [sum((v - mean) ** 2 for v in values) for values in (x, y)]
    if n < 2 or not all(spread):
        return float("nan")
    return sum((u - mean) * (v - mean) for u, v in zip(x, y)) / (spread[0] * spread[1]) ** 0.5


def picked(ranked: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of a list ordered by the model: its first half best, the rest evenly spread, in order."""
    if len(ranked) <= most:
        return list(ranked)
    best = most // 2
    rest = ranked[best:]
    return [*ranked[:best], *(rest[(2 * i + 1) * len(rest) // (2 * (most - best))] for i in range(most - best))]


def measure(
    tasks: Sequence[Task],
    sm: int,
    source: str,
    timer: Timer,
    make: Make,
    seconds: float,
    *,
    keep_bits: bool = False,
    using: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
    notify: Notify = lambda *_: None,
    save: Callable[[Measured], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Measured:
    """Measure candidates of each task, the model's favourites first, until the time is up.

    Args:
        tasks: in order of importance; each has an even share of the time that is left.
        sm: whose tables are tuned.
        source: written beside every line.
        timer: seconds of one call; an error rules the candidate out.
        make: builds the call of an operator on a shape and dtype.
        seconds: for all tasks.
        keep_bits: leave the knobs that change bits as they are.
        using: a context in which one backend serves.
        notify: told task, number done and number of tasks.
        save: called after every task.
    """
    out = Measured()
    end = clock() + seconds
    for number, task in enumerate(tasks):
        notify(f"{task.op}, {task.backend}, {task.dtypes[0]}", number, len(tasks))
        now = clock()
        if now >= end:
            out.left.append(task)
            continue
        run = _Run(out, task, sm, source, timer, make, now + (end - now) / (len(tasks) - number), clock)
        with using(task.backend):
            run.all(keep_bits)
        save(out)
    notify("", len(tasks), len(tasks))
    return out


class _Run:
    """The measurement of one task."""

    def __init__(
        self, out: Measured, task: Task, sm: int, source: str, timer: Timer, make: Make, until: float, clock: Any
    ) -> None:
        self.out, self.task, self.source, self.timer, self.make = out, task, source, timer, make
        self.until, self.clock = until, clock
        self.own = tables.module(task.op)
        self.gpu = tables.GPUS[tables.nearest(sm)]
        self.layers = (_files.shipped(tables.nearest(sm)),)

    def all(self, keep_bits: bool) -> None:
        backend, op, dtypes = self.task
        bits = self.own.BITS[backend]
        known: dict[Any, list[Sample]] = {}
        fixed: dict[Any, dict[str, int]] = {}
        for shape in tables.shapes(op, dtypes[0]):
            bucket, canonical = self.own.bucket(shape), self.own.frozen(shape)
            at = tuple(canonical.items())
            if at not in fixed:
                fixed[at] = tables.frozen(backend, op, self.gpu, dtypes[0], shape, self.layers)[0]
                if bits and not keep_bits:
                    known[at] = self.samples(canonical, {})
                    best = self.best(known[at])
                    if best is not None:
                        fixed[at] = {name: v for name, v in best.candidate.knobs.items() if name in bits}
                        self.put(self.out.table.frozen, canonical, best, fixed[at])
            found = [s for s in known.get(tuple(bucket.items()), []) if fixed[at].items() <= s.candidate.knobs.items()]
            best = self.best(found or self.samples(bucket, fixed[at]))
            if best is not None:
                self.put(self.out.table.entries, bucket, best, best.candidate.knobs)

    def put(self, lines: dict[Any, Entry], bucket: Mapping[str, int], best: Sample, knobs: dict[str, int]) -> None:
        for dtype in self.task.dtypes:
            where = self.source if dtype == self.task.dtypes[0] else f"{self.source} in {self.task.dtypes[0]}"
            line = Entry(dict(knobs), best.candidate.limit, where, best.measured)
            lines[key(self.task.backend, self.task.op, dtype, bucket)] = line

    def best(self, samples: Sequence[Sample]) -> Sample | None:
        if not samples:
            return None
        fastest = min(samples, key=lambda s: s.measured)
        return fastest if fastest.measured < MARGIN * samples[0].measured else samples[0]

    def samples(self, shape: Mapping[str, int], fixed: Mapping[str, int]) -> list[Sample]:
        """Measured candidates with these knobs fixed, the model's choice first."""
        backend, op, dtypes = self.task
        try:
            plain = tables.fastest(self.own, backend, op, self.gpu, dtypes[0], shape, dict(fixed)).knobs
        except ValueError as error:
            self.out.failed.append(short(error))
            return []
        ranked = sorted(
            (c.knobs != plain, self.own.seconds(backend, self.gpu, dtypes[0], shape, c.knobs), i, c)
            for i, c in enumerate(self.own.candidates(backend, self.gpu, dtypes[0], shape))
            if c.rejected is None and fixed.items() <= c.knobs.items()
        )
        out: list[Sample] = []
        if self.clock() >= self.until:
            return out
        try:
            call = self.make(op, shape, dtypes[0])
        except RuntimeError as error:  # out of memory, most likely
            self.out.failed.append(f"{op}, {backend}, {dict(shape)}: {short(error)}")
            return out
        for _, modelled, _, candidate in picked(ranked, MOST[backend]):
            if out and self.clock() >= self.until:
                break
            try:
                with tables.forced(backend, op, candidate.knobs) as imposed:
                    out.append(Sample(candidate, modelled, self.timer(call)))
                if not imposed.asked:
                    self.out.failed.append(f"{op}, {backend}, {dtypes[0]}, {dict(shape)}: the reference served it")
                    return []
            except Exception as error:  # Triton's errors are no RuntimeErrors
                self.out.failed.append(f"{op}, {backend}, {candidate.knobs}: {short(error)}")
        if len(out) > 2:
            rank = spearman([s.modelled for s in out], [s.measured for s in out])
            self.out.ranks.setdefault((backend, op), []).append((rank, len(out)))
        if out:
            gain = out[0].measured / min(s.measured for s in out)
            self.out.gains.setdefault((backend, op), []).append(gain)
        return out


def merged(found: dict[str, Any], sm: int, about: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    """A tuning file with these measurements in; what it held of other SMs, operators and shapes stays."""
    old = found["gpus"].get(str(sm))
    table = Table({}, {}) if old is None else _files.parse(old, sm)
    table.frozen.update(measured.table.frozen)
    table.entries.update(measured.table.entries)
    # A line whose knobs disagree with new frozen ones would never count.
    stale = [at for at, entry in table.entries.items() if not _agrees(at, entry, table)]
    for at in stale:
        del table.entries[at]
    correlation = {backend: dict(by) for backend, by in (old or {}).get("correlation", {}).items()}
    for backend, by in measured.correlation().items():
        correlation.setdefault(backend, {}).update(by)
    mine = {
        **about,
        "correlation": correlation,
        "frozen": _files.lines(table.frozen),
        "entries": _files.lines(table.entries),
    }
    return {**found, "gpus": {**found["gpus"], str(sm): mine}}


def _agrees(at: Any, entry: Entry, table: _files.Table) -> bool:
    backend, op, dtype, *bucket = at
    own = tables.module(op)
    fixed = table.frozen.get(key(backend, op, dtype, own.frozen(dict(bucket))))
    return fixed is None or fixed.knobs.items() <= entry.knobs.items()
