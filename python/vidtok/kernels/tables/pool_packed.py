"""pool_packed: one access of 16 bytes of a pooled token per thread, ``vectors`` of its window's tokens at a time.

Bytes: a 2 × 2 window is read per row written. A window that fits ``vectors`` is one wait for memory, else each part
is. No knob changes bits: each sum has one owner and goes in window order.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import Knobs, Shape, Works
from vidtok.kernels.tables.gpus import Gpu
from vidtok.kernels.tables.plan_apply import bucket as bucket
from vidtok.kernels.tables.plan_apply import frozen as frozen
from vidtok.kernels.tables.plan_apply import moved

SHAPE = ("rows", "channels", "itemsize")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (128, 256, 512, 1024), "vectors": (1, 2, 4)},
    "triton": {"block": (512, 1024, 2048, 4096), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset()}
SHAPES = [
    {"rows": 2048, "channels": 4096, "itemsize": 2},
    {"rows": 8192, "channels": 4096, "itemsize": 2},
    {"rows": 8192, "channels": 1024, "itemsize": 2},
]


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    return moved(backend, shape, knobs, reads=4, spread=False)


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
