"""topk_select: one block per segment; radix passes of eleven bits, then a stable scan.

Keys stay in shared memory where they fit (four bytes each beside 8 KiB of counts), else every pass reads them again
from the L2 cache; Triton's stay in registers where a step holds them all. Chain: passes · (keys per thread + barriers),
and a scan of the same length. Registers are the compilers' (sm_80), for Triton a line through them. No knob changes
bits: the selection is exact.
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
PASSES = 4  # three of digits, one that writes
SCRATCH = 4 * (2048 + 68)  # bytes of counts of 11-bit digits
KEPT = 8192  # keys of one of many segments that stay in shared memory
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
    each = step // threads
    if backend == "cuda":
        room = (gpu.shared_block - SCRATCH) // 4
        kept = min(segments * longest, room if segments == 1 else min(room, KEPT))
        if longest > kept and segments == 1:
            kept = 0
        cached, shared, registers = longest <= kept, SCRATCH + 4 * kept, 49
    else:
        cached, shared, registers = longest <= step, 1024, int(38 + 5.3 * each)
    # One shared-memory atomic per key, four warps of an SM at a time; each step costs the scan's barriers.
    work = ceil(longest, step) * each * max(1, threads // 128) * 12 * CYCLE
    per_pass = work + (3 + ceil(longest, step)) * barrier(threads) + (0.0 if cached else LATENCY)
    return [
        Work(
            blocks=segments,
            threads=threads,
            registers=registers,
            shared=shared,
            bytes=segments * longest * 12,
            flight=4.0 * each,
            l2=0.0 if cached else 4.0 * PASSES * segments * longest,
            chain=2 * LATENCY + PASSES * per_pass,
            name="the selection",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
