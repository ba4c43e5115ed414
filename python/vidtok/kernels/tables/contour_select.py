"""contour_select: cuts of the channels are projected, then one block per sequence weighs, factors and picks.

FLOP per sequence: ``2·T·C·r`` of projection, ``2·T·r²`` of covariance, ``r³/3`` of Cholesky, in fp64 (half the fp32
rate, a 64th of it on sm_86 and 89). Chain: ``r`` steps with barriers, which grow with the warps, and passes over the
frames, which shrink. Shared memory: ``8·r²`` bytes of covariance where they fit. The threads cut the sums over frames
and channels, so every knob changes bits and depends on dtype, channels and rank only.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("sequences", "longest", "rank", "channels")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"threads": (256, 128, 512, 1024)},
    "triton": {"block": (64, 32), "num_warps": (4, 1, 2, 8)},
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
    slow = 32 if gpu.sm in (86, 89) else 1  # fp64 over its rate elsewhere, half of fp32's
    project = Work(
        blocks=sequences * ceil(n, 16) * ceil(channels, 256),
        threads=256,
        registers=64,
        shared=8 * (16 * 33 + 32 * 64),
        bytes=float(sequences * n * channels * size(dtype)),
        flight=32.0,
        l2=8.0 * sequences * ceil(n, 16) * channels * rank,
        flops=4.0 * slow * sequences * n * channels * rank,
        chain=LATENCY + 8 * (2 * barrier(256) + LATENCY / 4),
        name="the projection",
    )
    held = 8 * rank * rank
    if held + 256 > gpu.shared_block:  # the covariance stays in the workspace
        held = 0
    each = ceil(n, threads)
    step = 2 * barrier(threads) + (25 + 4 * slow * ceil(rank * rank, 2 * threads)) * CYCLE
    solve = Work(
        blocks=sequences,
        threads=threads,
        registers=64,
        shared=held + 8464,
        bytes=8.0 * sequences * n * rank,
        flight=16.0,
        flops=2.0 * slow * sequences * (n * rank * rank + rank**3 / 3),
        # Steps of Cholesky, a pass over the frames for weights and means, radix passes for the median.
        chain=rank * step + 4 * LATENCY + each * 100 * CYCLE + 8 * (4 * barrier(threads) + each * 12 * CYCLE),
        name="the solve",
    )
    return [project, solve]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
