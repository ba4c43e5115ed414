"""Measure every case on this GPU; results are written after each, so that a run cut short still counts."""

from __future__ import annotations

import argparse
import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import gate
from bench.case import Case, Provider, clone, nbytes
from bench.gpu.limits import NAMES, GpuLimits
from bench.gpu.suites import SUITES
from bench.gpu.timing import Timer, timer
from bench.harness import _pairs, _quantiles, _reached
from bench.row import RESULTS, Row, commit, write

ROUNDS = 25
MOST_SETS = 64
# Calls in one graph at least: the time that its launch takes is shared by them.
CALLS = 16


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench.gpu``."""
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("suites", nargs="*", help=f"among {', '.join(SUITES)}; all when none is named")
    p.add_argument("--backend", default="auto", choices=("auto", "cuda", "triton"))
    p.add_argument("--out", type=Path, help="CSV; bench/results/<gpu>/<backend>.csv when left out")
    p.add_argument("--seconds", type=float, default=240.0, help="start no case after so long")
    p.add_argument("--tiny", action="store_true", help="shapes that show only that the program runs")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return p


def gpu_name(device: torch.device) -> str:
    """Name of the card as a folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def context(device: torch.device, backend: str) -> dict[str, Any]:
    """The fields that every row of a run shares."""
    import vidtok

    versions = f"vidtok {vidtok.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = "host"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    return {
        "threads": torch.get_num_threads(),
        "isa": backend,
        "machine": machine,
        "versions": versions,
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Side:
    """One provider: a graph of its calls on every input set, and its eager calls."""

    def __init__(self, clock: Timer, provider: Provider, sets: list[Any]) -> None:
        self.clock, self.provider, self.sets = clock, provider, sets
        self.at = 0
        self.calls = len(sets) * -(-CALLS // len(sets)) if clock.kind == "gpu" else len(sets)
        self.graph = clock.replayer(lambda at: provider.run(sets[at % len(sets)]), self.calls)

    def replay(self) -> float:
        """Seconds of one call inside a graph."""
        assert self.graph is not None
        return self.clock.seconds(self.graph) / self.calls

    def call(self) -> float:
        """Seconds from one eager call to its end, the host's share included."""
        self.clock.synchronize()
        self.at = (self.at + 1) % len(self.sets)
        start = time.perf_counter()
        self.provider.run(self.sets[self.at])
        self.clock.synchronize()
        return time.perf_counter() - start


def rotation(case: Case, inputs: Any, limits: GpuLimits) -> list[Any]:
    """Enough copies of the inputs to outgrow the L2 four times."""
    if limits.timer.kind == "host":
        return [inputs, clone(inputs)]
    wanted = max(2, min(MOST_SETS, -(-4 * limits.l2 // max(nbytes(inputs), 1))))
    return [inputs, *(clone(inputs) for _ in range(wanted - 1))]


def measure(case: Case, dtype: torch.dtype, limits: GpuLimits, clock: Timer, shared: dict[str, Any]) -> list[Row]:
    """Gate every side, then time them round by round, so that each ratio compares neighbours in time."""
    inputs = case.make(0)
    wanted = gate.expected(case, inputs)
    providers = [case.ours, *case.others, *([case.compiled] if case.compiled else [])]
    for provider in list(providers):
        try:
            gate.check(case, provider, inputs, wanted)
        except AssertionError:
            raise
        except Exception as error:
            if provider is not case.compiled:
                raise
            print(f"    torch.compile cannot: {(str(error).splitlines() or [repr(error)])[0]}", flush=True)
            providers.remove(provider)
    del wanted
    with torch.no_grad():
        sets = rotation(case, inputs, limits)
        sides = [Side(clock, p, sets) for p in providers]
        launches = clock.launches(lambda: case.ours.run(inputs))
        syncs = clock.syncs(lambda: case.ours.run(inputs))
        work = case.passes()
        least = limits.seconds(work, dtype, launches)
        samples: dict[str, dict[str, list[tuple[int, float]]]] = {"graph": {}, "call": {}}
        rounds = ROUNDS if clock.kind == "gpu" else 2  # a host's times say nothing
        gc.disable()
        try:
            for i in range(rounds):
                for side in sides:
                    role = side.provider.role
                    samples["call"].setdefault(role, []).append((i, side.call()))
                    if side.graph is not None:
                        samples["graph"].setdefault(role, []).append((i, side.replay()))
        finally:
            gc.enable()
    kind = limits.kind(work, dtype, launches)
    rows = []
    for how in ("graph", "call"):
        # A side that cannot be captured is compared by what a call of it takes.
        ours = samples[how].get("vidtok") or samples["call"]["vidtok"]
        taken = {p.role: samples[how].get(p.role) or samples["call"][p.role] for p in providers}
        speedups = {role: _pairs(s, ours) for role, s in taken.items()}
        for p in providers:
            p20, p50, p80 = _quantiles(taken[p.role])
            over = p50 * 1e-6 / least
            mine = p.role == "vidtok" and how == "graph"
            captured = how == "call" or p.role in samples["graph"]
            rows.append(
                Row(
                    "time", "µs", case.operator, f"{case.name}, {NAMES[dtype]}", how, p.role,
                    p.label + ("" if captured else " (not captured)"), p20, p50, p80, rounds, least * 1e6, kind, over,
                    speedups[p.role], sum(b for b, _ in work), sum(f for _, f in work),
                    ", ".join(map(str, case.targets)) if mine else "",
                    _reached(case, over, p50, speedups) if mine else "", **shared,
                )
            )  # fmt: skip
    for name, value in (("kernels launched", launches), ("waits for the GPU", syncs)):
        rows.append(
            Row("count", "", case.operator, f"{case.name}, {NAMES[dtype]}", "", "vidtok", name, value, value, value, 1,
                **shared)
        )  # fmt: skip
    return rows


def show(rows: list[Row]) -> str:
    """One line for the terminal."""
    ours = next(r for r in rows if r.role == "vidtok" and r.cache == "graph")
    call = next(r for r in rows if r.role == "vidtok" and r.cache == "call")
    others = [f"{r.role} {r.speedup:.2f}×" for r in rows if r.cache == "graph" and r.role != "vidtok"]
    counts = [f"{r.label} {r.p50:.0f}" for r in rows if r.metric == "count"]
    return (
        f"    {ours.p50:8.1f} µs (call {call.p50:.1f})  {ours.over_limit:.2f} × limit ({ours.limit_kind})  "
        + "  ".join(others + counts)
        + (f"  {ours.reached}" if ours.reached else "")
    )


def limit_rows(limits: GpuLimits, shared: dict[str, Any]) -> list[Row]:
    """The measured rates, as rows."""
    rates = {"torch.copy_": ("GB/s", limits.copy_rate / 1e9), "empty launch": ("µs", limits.launch * 1e6)}
    rates |= {f"torch.mm {NAMES[d]}": ("GFLOP/s", r / 1e9) for d, r in limits.flop_rates.items()}
    return [Row("rate", u, "limit", k, "", "limit", k, v, v, v, 15, **shared) for k, (u, v) in rates.items()]


def main(arguments: list[str] | None = None, log: Callable[[str], None] = print) -> int:
    """Run what is asked for; 1 when the gate was red."""
    args = parser().parse_args(arguments)
    unknown = set(args.suites) - set(SUITES)
    if unknown:
        print(f"expected suites among {', '.join(SUITES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not args.tiny:
        print("expected a GPU, got none; --tiny shows that the program runs", file=sys.stderr)
        return 2
    import vidtok

    start = time.perf_counter()
    clock = timer()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    half = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = torch.bfloat16 if half else torch.float16
    out = args.out or RESULTS / gpu_name(device) / f"{args.backend}.csv"
    shared = context(device, args.backend)
    limits = GpuLimits(clock, device, args.tiny)
    rows = limit_rows(limits, shared)
    for row in rows:
        log(f"  {row.label}: {row.p50:.2f} {row.unit}")
    failed = 0
    with vidtok.use_backend(args.backend):
        for name in args.suites or SUITES:
            for case in SUITES[name](device, dtype, args.tiny):
                took = time.perf_counter() - start
                if took > args.seconds:
                    log(f"[{took:5.0f} s] {case}: left out, the {args.seconds:.0f} s are over")
                    continue
                if args.no_compile:
                    case = replace(case, compiled=None)
                log(f"[{took:5.0f} s] {case}")
                torch._dynamo.reset()
                try:
                    new = measure(case, dtype, limits, clock, shared)
                except AssertionError as error:
                    failed += 1
                    log(f"    GATE RED, nothing timed: {error}")
                    continue
                except Exception as error:
                    failed += 1
                    log(f"    FAILED, nothing timed: {type(error).__name__}: {error}")
                    continue
                rows += new
                write(rows, out)
                log(show(new))
    write(rows, out)
    log(f"wrote {out}; took {time.perf_counter() - start:.0f} s; {failed} cases red")
    ratios = [r.over_limit for r in rows if r.role == "vidtok" and r.cache == "graph" and r.over_limit]
    if ratios:
        log(f"median {statistics.median(ratios):.2f} × limit over {len(ratios)} cases")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
