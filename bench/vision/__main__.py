"""Token merging inside whole vision towers and that of STOP, measured on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.row import ROOT, Row, context, machine_file, write

sys.path.insert(0, str(ROOT / "python"))

import torch

from bench import allocator, clock, readme
from bench.vision import memory, stop
from bench.vision.measure import Case, Rows, measure
from bench.vision.model import BASE, LARGE, TINY

# A round of the large tower at batch 8 takes up to a minute: the published form alone, in fp32 at two r.
CASES: tuple[Case, ...] = (
    Case(BASE, 8, "fp32", 70),
    Case(BASE, 1, "fp32", 25),
    Case(BASE, 8, "bf16", 40),
    Case(BASE, 1, "bf16", 15),
    Case(LARGE, 1, "fp32", 80),
    Case(LARGE, 1, "bf16", 45),
    Case(LARGE, 8, "fp32", 130, (8, 16), every=False),
    Case(LARGE, 8, "bf16", 90, every=False),
)
GPU_CASES = tuple(
    Case(shape, batch, dtype, 3) for shape in (BASE, LARGE) for dtype in ("bf16", "fp32") for batch in (64, 8, 1)
)
TINY_CASES = (Case(TINY, 2, "fp32", 0.1, (0, 8)), Case(TINY, 1, "bf16", 0.1, (8,)))


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench.vision``."""
    p = argparse.ArgumentParser(prog="python -m bench.vision", description=__doc__)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    p.add_argument(
        "--clock", choices=clock.CLOCKS, default="wall", help="cpu: thread time, for --threads 1 on a busy machine"
    )
    p.add_argument("--case", help="cases whose name holds this")
    p.add_argument("--seconds", type=float, help="for the rounds of each case")
    p.add_argument("--compile", action="store_true", help="the plain tower and the published form compiled, too")
    p.add_argument("--no-memory", action="store_true", help="leave the training step out")
    p.add_argument("--tiny", action="store_true", help="shapes that show only that the program runs")
    p.add_argument("--out", type=Path, help="CSV; bench/results/vision-<machine>.csv when left out")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV, and fill the README from it."""
    args = parser().parse_args(arguments)
    clock.use(args.clock)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shared: dict[str, Any] = context(args.threads)
    cases = CASES
    if device.type == "cuda":
        from bench.gpu.__main__ import context as gpu_context

        shared, cases = gpu_context(device, "auto"), GPU_CASES
    cases = TINY_CASES if args.tiny else cases
    cases = tuple(case for case in cases if (args.case or "") in str(case))
    start = time.perf_counter()
    print(f"{shared['machine']}; {shared['versions']}", flush=True)
    rows, made = Rows(shared, args.tiny), list[Row]()
    if not args.no_memory:
        shape, batch, merges = (TINY, 2, (8,)) if args.tiny else (BASE, 8, (4, 8, 16))
        made += memory.measure(shape, batch, merges, rows, device)
    allocator.keep_memory()
    for case in cases:
        made += measure(replace(case, seconds=args.seconds or case.seconds), rows, device, args.compile)
    videos = (stop.TINY,) if args.tiny else stop.CASES
    for video in videos:
        if (args.case or "") in str(video):
            made += stop.measure(replace(video, seconds=args.seconds or video.seconds), rows, device)
    partial = bool(args.case or args.no_memory or args.tiny or device.type == "cuda")
    path = args.out or (None if partial else machine_file("vision"))
    if path:
        write(made, path)
        print(f"wrote {path}")
    if path == machine_file("vision"):
        readme.README.write_text(readme.filled(readme.README.read_text(), readme.vision_block(), readme.VISION_MARKS))
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
