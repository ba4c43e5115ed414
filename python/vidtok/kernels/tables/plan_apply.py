"""plan_apply: one group of threads per row of the output, each thread ``vectors`` loads of 16 bytes.

Bytes: every row is read and written once, with 12 bytes of lists. A row of V 16-byte pieces takes ``V / vectors``
threads, so that short rows share a block and threads beyond the row idle. More vectors keep more bytes in flight
and hold more registers (fp32 sums). Chain: the list, then the row. No knob changes bits: each sum has one owner
and goes in list order.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import LATENCY, Knobs, Shape, Work, Works, ceil, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("rows", "channels", "itemsize")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (128, 256, 512, 1024), "vectors": (1, 2, 4)},
    "triton": {"block": (512, 1024, 2048, 4096), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset()}
READS = 1.0  # rows read per row written
SHAPES = [
    {"rows": 1024, "channels": 1024, "itemsize": 2},
    {"rows": 1024, "channels": 4096, "itemsize": 2},
    {"rows": 8192, "channels": 4096, "itemsize": 2},
    {"rows": 32768, "channels": 1024, "itemsize": 2},
    {"rows": 32768, "channels": 4096, "itemsize": 2},
]


def bucket(shape: Shape) -> dict[str, int]:
    """Rows and channels rounded up to a power of two."""
    return {
        "rows": up(shape["rows"], 64, 65536),
        "channels": up(shape["channels"], 64, 16384),
        "itemsize": shape["itemsize"],
    }


def moved(backend: str, shape: Shape, knobs: Knobs, reads: float, sums: int) -> list[Work]:
    """The launch of a kernel that makes rows out of ``reads`` rows each, with ``sums`` registers per vector."""
    rows, width = shape["rows"], shape["channels"] * shape["itemsize"]
    pieces = ceil(width, 16)
    if backend == "cuda":
        threads, vectors = knobs["threads"], knobs["vectors"]
        lanes = ceil(pieces, vectors)
        per_block = max(1, threads // lanes)
        blocks = ceil(rows, per_block) * ceil(lanes, threads)
        used = min(1.0, per_block * lanes / threads) / max(1.0, ceil(lanes, threads) * threads / lanes)
    else:
        threads = 32 * knobs["num_warps"]
        span = knobs["block"] * shape["itemsize"]
        blocks = rows * ceil(width, span)
        vectors = max(1, span // (16 * threads))
        used = min(1.0, width / (ceil(width, span) * max(span, 16 * threads)))
    return [
        Work(
            blocks=blocks,
            threads=threads,
            registers=24 + sums * vectors,
            shared=0,
            bytes=rows * ((reads + 1) * width + 12),
            flight=16 * vectors * used,
            chain=2 * LATENCY,
            name="the move",
        )
    ]


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on; there are none."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    return moved(backend, shape, knobs, READS, 12)


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
