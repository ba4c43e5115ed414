"""position_remap: one access of 8 bytes of one rider per thread; all riders in one launch.

Bytes: ``bytes`` per row read and written, and the anchor for each rider. Small blocks spread few rows over more SMs;
large ones cost fewer waves. Chain: the anchor, then the entry. No knob changes bits: nothing is summed.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import LATENCY, Knobs, Shape, Work, Works, ceil, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("rows", "tensors", "bytes")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (256, 128, 512, 1024)},
    "triton": {"block": (256, 128, 512, 1024), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset()}
SHAPES = [
    {"rows": 1024, "tensors": 4, "bytes": 64},
    {"rows": 8192, "tensors": 4, "bytes": 64},
    {"rows": 32768, "tensors": 4, "bytes": 64},
]


def bucket(shape: Shape) -> dict[str, int]:
    """Rows and bytes rounded up to a power of two."""
    return {
        "rows": up(shape["rows"], 64, 65536),
        "tensors": up(shape["tensors"], 1, 16),
        "bytes": up(shape["bytes"], 4, 256),
    }


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on; there are none."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    rows, width = shape["rows"], shape["bytes"]
    accesses = rows * ceil(width, 8)
    threads = knobs["threads"] if backend == "cuda" else 32 * knobs["num_warps"]
    per_block = threads if backend == "cuda" else knobs["block"]
    each = per_block / threads
    if each < 1:
        return f"{threads} threads share {per_block} accesses, and a thread without one does nothing"
    return [
        Work(
            blocks=ceil(accesses, per_block),
            threads=threads,
            registers=32 if backend == "cuda" else int(28 + 6 * each),
            shared=0,
            bytes=rows * (2 * width + 4.0 * shape["tensors"]),
            flight=8 * each,
            chain=2 * LATENCY + _model.CYCLE * threads / 32,
            name="the remap",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
