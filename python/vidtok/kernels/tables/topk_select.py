"""topk_select: one block per segment; four radix passes of eight bits, then a stable scan.

Keys stay in shared memory where they fit (``4 · longest`` bytes and 1 KiB of counts per warp), else every pass
reads them again from the L2 cache. Chain: passes · (keys per thread + barriers), and a scan of the same length. No
knob changes bits: the selection is exact.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("segments", "longest")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (256, 128, 512, 1024)},
    "triton": {"block": (1024, 256, 512, 2048, 4096), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset()}
PASSES = 5  # four of digits, one that writes
SHAPES = [
    {"segments": 1, "longest": 8192},
    {"segments": 1, "longest": 32768},
    {"segments": 32, "longest": 256},
    {"segments": 32, "longest": 1024},
    {"segments": 1024, "longest": 256},
]


def bucket(shape: Shape) -> dict[str, int]:
    """Segments and their length rounded up to a power of two."""
    return {"segments": up(shape["segments"], 1, 4096), "longest": up(shape["longest"], 32, 1 << 20)}


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on; there are none."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    threads = knobs["threads"] if backend == "cuda" else 32 * knobs["num_warps"]
    segments, longest = shape["segments"], shape["longest"]
    step = threads if backend == "cuda" else max(threads, knobs["block"])
    counts = 32 * threads if backend == "cuda" else 4096
    keys = 4 * longest
    cached = counts + keys <= gpu.shared_block
    per_thread = ceil(longest, step) * (step // threads)
    # One shared-memory atomic per key, four warps of an SM at a time; each step costs the scan's barriers.
    work = per_thread * max(1, threads // 128) * 12 * CYCLE
    per_pass = work + (3 + ceil(longest, step)) * barrier(threads) + (0.0 if cached else LATENCY)
    return [
        Work(
            blocks=segments,
            threads=threads,
            registers=32 if backend == "cuda" else 32 + 2 * (step // threads),
            shared=counts + (keys if cached else 0),
            bytes=segments * longest * 12,
            flight=16.0,
            l2=0.0 if cached else 4.0 * PASSES * segments * longest,
            chain=2 * LATENCY + PASSES * per_pass,
            name="the selection",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
