"""plan_apply: the output is one line of 16-byte accesses, cut into equal blocks; ``vectors`` of them per thread.

Bytes: every row is read and written once, with 12 bytes of lists. More vectors keep more bytes in flight and hold more
registers. Triton's programs hold ``block`` elements, whole rows where they are shorter. Chain: the list, then the row.
Registers are the compilers' (sm_80), for Triton a line through them. No knob changes bits: each sum has one owner and
goes in list order.
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
# Registers per thread by vectors.
GATHER = {1: 22, 2: 30, 4: 38}
POOL = {1: 34, 2: 38, 4: 54}
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


def moved(backend: str, shape: Shape, knobs: Knobs, *, reads: int, spread: bool) -> list[Work]:
    """The launch of a kernel that makes rows out of ``reads`` rows each.

    Args:
        spread: whether the vectors of a thread belong to several outputs, else to the rows of one.
    """
    rows, width = shape["rows"], shape["channels"] * shape["itemsize"]
    if backend == "cuda":
        threads, vectors = knobs["threads"], knobs["vectors"]
        blocks = ceil(rows * ceil(width, 16), threads * (vectors if spread else 1))
        registers = (GATHER if spread else POOL)[vectors]
        flight, turns = 16.0 * vectors, 1 if spread else ceil(reads, vectors)
    else:
        threads = 32 * knobs["num_warps"]
        block = min(knobs["block"], max(16, 1 << (shape["channels"] - 1).bit_length()))
        # A gather puts short rows together; sums and windows have a program each.
        together = knobs["block"] // block if spread else 1
        blocks = ceil(rows, together) * ceil(shape["channels"], block)
        each = max(16.0 / shape["itemsize"], together * block / threads)
        registers = int(16 + 3.9 * each) if spread else int(40 + 4 * each)
        flight = shape["itemsize"] * each * min(1.0, shape["channels"] / (ceil(shape["channels"], block) * block))
        turns = reads
    return [
        Work(
            blocks=blocks,
            threads=threads,
            registers=registers,
            shared=0,
            bytes=rows * ((reads + 1) * width + 12),
            flight=flight,
            chain=(1 + turns) * LATENCY,
            name="the move",
        )
    ]


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on; there are none."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    return moved(backend, shape, knobs, reads=1, spread=True)


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
