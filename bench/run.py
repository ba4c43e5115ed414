"""The whole run: limits, every case, call overhead, peak memory; then CSV, README table and plots."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from bench import allocator, clock, overhead
from bench.harness import Budget, measure
from bench.limits import Limits
from bench.row import ROOT, Row, context, machine_file, write
from bench.suites import SUITES

# Above this share of the processors' time in other programs, wall times of two threads are no longer ours.
BUSY = 0.1


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench``."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument(
        "operators", nargs="*", metavar="OPERATOR", help=f"among {', '.join(SUITES)}; all when none is named"
    )
    p.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    p.add_argument(
        "--clock", choices=clock.CLOCKS, default="wall", help="cpu: thread time, for --threads 1 on a busy machine"
    )
    p.add_argument("--case", default="", help="only cases whose name holds this text")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--no-extras", action="store_true", help="leave call overhead and peak memory out")
    p.add_argument("--seconds", type=float, default=Budget.cold, help="per case, cold")
    p.add_argument("--out", type=Path, help="CSV; bench/results/cpu-<machine>.csv for a whole run, none for a part")
    return p


def limit_rows(limits: Limits, shared: dict) -> list[Row]:
    """The measured rates, as rows."""
    rows = []
    read = {"torch.sum": limits.read_rate}
    for unit, rates in (("GB/s", limits.copy_rates), ("GB/s read", read), ("GFLOP/s", limits.flop_rates)):
        for name, rate in rates.items():
            value = rate / 1e9
            rows.append(Row("rate", unit, "limit", name, "", "limit", name, value, value, value, 25, **shared))
    return rows


def show(rows: list[Row]) -> str:
    """One line for the terminal."""
    ours = next(r for r in rows if r.role == "vidtok")
    parts = [f"{ours.p50:10.1f} µs"]
    if ours.over_limit is not None:
        parts.append(f"{ours.over_limit:5.2f} × limit ({ours.limit_kind})")
    parts += [f"{r.role} {r.speedup:.2f}× ({r.over_limit:.1f})" for r in rows if r.role != "vidtok"]
    return f"    {ours.cache:4} " + "  ".join(parts) + (f"  {ours.reached}" if ours.reached else "")


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 when the gate was red."""
    args = parser().parse_args(arguments)
    unknown = set(args.operators) - set(SUITES)
    if unknown:
        print(f"expected operators among {', '.join(SUITES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    clock.use(args.clock)
    torch.set_num_threads(args.threads)
    if not allocator.keep_memory():
        print("no mallopt here: times of fresh memory are included")
    start = time.perf_counter()
    shared = context(args.threads)
    print(f"{shared['machine']}, {shared['isa']}; {shared['versions']}; commit {shared['commit']}")
    limits = Limits(args.threads)
    elsewhere = limits.taken_elsewhere()
    if elsewhere > BUSY and args.clock == "wall":
        print(f"  other programs take {elsewhere:.0%} of the processors: these times say little (see --clock)")
        shared["machine"] = f"{shared['machine']}, {elsewhere:.0%} of them taken by other programs"
    rows = limit_rows(limits, shared)
    for row in rows:
        print(f"  {row.label}: {row.p50:.1f} {row.unit}")
    budget = Budget(cold=args.seconds, hot=args.seconds / 5)
    failed = 0
    for name in args.operators or SUITES:
        for case in SUITES[name]():
            if args.case not in case.name:
                continue
            if args.no_compile:
                case = case.__class__(**{**case.__dict__, "compiled": None})
            print(f"[{time.perf_counter() - start:5.0f} s] {case}", flush=True)
            torch._dynamo.reset()
            try:
                new = measure(case, limits, shared, budget)
            except AssertionError as error:
                failed += 1
                print(f"    GATE RED, nothing timed: {error}", flush=True)
                continue
            rows += new
            for cache in ("cold", "hot"):
                print(show([r for r in new if r.cache == cache]), flush=True)
    if not args.no_extras:
        rows += overhead.rows(shared)
        from bench import memory

        rows += memory.rows(shared)
    path = args.out or (None if args.operators or args.case else machine_file("cpu"))
    if failed and path == machine_file("cpu"):
        path = ROOT / "out" / path.name  # what was green, out of the way of the last good run
    if path:
        write(rows, path)
        print(f"wrote {path}")
    if path == machine_file("cpu"):
        from bench import plots, readme

        plots.draw(path)
        readme.update(path)
    print(f"took {time.perf_counter() - start:.0f} s; {failed} cases red")
    return 1 if failed else 0
