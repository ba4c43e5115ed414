"""contour_select: one block per sequence projects, forms the covariance, factors it and measures distances.

FLOP per sequence: ``2·T·C·r`` of projection, ``2·T·r²`` of covariance, ``r³/3`` of Cholesky, ``T·r²`` of solves,
by FMA at one per thread and clock. Chain: ``3·r`` steps with barriers, which grow with the warps. Shared memory:
``4·r²`` bytes of covariance and ``4·(T + r)`` of vectors. The threads cut the sums over tokens and channels, so every
knob changes bits and depends on dtype, channels and rank only.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("sequences", "longest", "rank", "channels")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (256, 128, 512, 1024)},
    "triton": {"block": (64, 32, 128), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset({"threads"}), "triton": frozenset({"block", "num_warps"})}
CANONICAL = {"sequences": 4, "longest": 1024}
SHAPES = [{**CANONICAL, "rank": 64, "channels": c} for c in (1024, 2048, 4096)]


def bucket(shape: Shape) -> dict[str, int]:
    """Rank and channels rounded up to a power of two; sequences and their length take no part in the choice."""
    return {**CANONICAL, "rank": up(shape["rank"], 1, 256), "channels": up(shape["channels"], 64, 16384)}


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    threads = knobs["threads"] if backend == "cuda" else 32 * knobs["num_warps"]
    n, rank, channels, sequences = shape["longest"], shape["rank"], shape["channels"], shape["sequences"]
    project = Work(
        blocks=sequences * ceil(n, 16),
        threads=threads,
        registers=40 + ceil(16 * rank, threads),
        shared=16 * 64 * 4 + 64 * rank * 4,
        bytes=float(sequences * n * channels * size(dtype)),
        flight=32.0,
        l2=4.0 * sequences * ceil(n, 16) * channels * rank,
        flops=2.0 * sequences * n * channels * rank,
        chain=LATENCY + ceil(channels, 64) * (2 * barrier(threads) + LATENCY / 8),
        name="the projection",
    )
    held = rank * rank * 4 + 8 * (n + rank)
    if backend == "triton":
        held = rank * rank * 4 + knobs["block"] * rank * 4
    if held > gpu.shared_block:  # the covariance stays in the workspace
        held = 8 * (n + rank)
    fma = 2.0 * n * rank * rank + rank**3 / 3 + 1.0 * n * rank * rank
    solve = Work(
        blocks=sequences,
        threads=threads,
        registers=40 + (ceil(knobs["block"] * rank, threads) if backend == "triton" else 24),
        shared=held,
        bytes=4.0 * sequences * n * rank,
        flight=16.0,
        flops=sequences * fma,
        chain=3 * rank * (barrier(threads) + 25 * CYCLE) + 4 * LATENCY + ceil(n, threads) * 60 * CYCLE,
        name="the solve",
    )
    return [project, solve]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
