"""Reduction in front of and inside a whole decoder, measured on this machine."""

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
from bench.decoder.measure import Bench
from bench.decoder.memory import scoring_memory
from bench.decoder.model import ATTENTION, GPU, NARROW, TINY, UNIFORM, VISUAL, Size


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench.decoder``."""
    p = argparse.ArgumentParser(prog="python -m bench.decoder", description=__doc__)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    p.add_argument(
        "--clock", choices=clock.CLOCKS, default="wall", help="cpu: thread time, for --threads 1 on a busy machine"
    )
    p.add_argument("--pairs", type=int, help="pairs of prefills")
    p.add_argument("--tiny", action="store_true", help="shapes that show only that the program runs")
    p.add_argument("--out", type=Path, help="CSV; bench/results/decoder-<machine>.csv when left out")
    return p


def measure(size: Size, device: torch.device, dtype: torch.dtype, shared: dict[str, Any]) -> list[Row]:
    """Every row of one machine."""
    bench = Bench(size, device, dtype, shared)
    with torch.no_grad():
        rows = bench.prefills(UNIFORM, hand=True, decoder=UNIFORM)
        rows += bench.prefills(ATTENTION, decoder=ATTENTION)
        rows += bench.prefills(VISUAL, visual=VISUAL)
        rows += bench.decode()
        rows += bench.scoring()
        rows += bench.overhead(UNIFORM, decoder=UNIFORM)
        rows += bench.overhead(VISUAL, visual=VISUAL)
    peak = 1.048576 * scoring_memory(size, device, int(shared["threads"]))
    name = f"peak of scoring at {size.scored} tokens of {size.scored_width}"
    rows.append(bench.row(name, "beyond the hidden states", "MB", (peak, peak, peak), 1, bound=100))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV, and fill the README from it."""
    args = parser().parse_args(arguments)
    clock.use(args.clock)
    torch.set_num_threads(args.threads)
    allocator.keep_memory()
    device = torch.device(args.device)
    shared: dict[str, Any] = context(args.threads)
    size, dtype = Size(), torch.float32
    if device.type == "cuda":
        from bench.gpu.__main__ import context as gpu_context

        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        wide = torch.cuda.get_device_properties(device).total_memory > 40 * 2**30
        size, shared = (GPU if wide else replace(GPU, **NARROW)), gpu_context(device, "auto")
    size = TINY if args.tiny else size
    size = replace(size, pairs=args.pairs) if args.pairs else size
    start = time.perf_counter()
    print(f"{shared['machine']}; {shared['versions']}; {size}", flush=True)
    rows = measure(size, device, dtype, shared)
    path = args.out or (None if args.tiny or device.type == "cuda" else machine_file("decoder"))
    if path:
        write(rows, path)
        print(f"wrote {path}")
    if path == machine_file("decoder"):
        readme.README.write_text(readme.filled(readme.README.read_text(), readme.decoder_block(), readme.DECODER_MARKS))
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
