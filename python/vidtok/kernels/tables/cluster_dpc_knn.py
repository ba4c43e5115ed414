"""cluster_dpc_knn: a Gram sweep over upper-triangle tiles, then densities, parents, centres and assignment.

The sweep does ``2 · tile² · channels`` FLOP per tile on tensor cores (FMA for fp32) over steps of 128 bytes of
channels, ``stages`` of them in flight; rows come again from the L2 cache for every tile. Large tiles read less and
leave SMs idle on small segments; their sums take ``tile² / threads`` registers. Pipelines deeper than two need
cp.async, which sm_70 lacks. The other launches read the distances kept in a workspace. Tiles and stages leave every
product in channel order; warps (norms) and Triton's depth of a step cut sums, so they depend on the channels only.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("segments", "longest", "channels")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"tile": (64, 32, 128), "warps": (4, 1, 2, 8), "stages": (2, 1, 3, 4)},
    "triton": {"tile": (64, 32, 128), "depth": (64, 32, 128), "num_warps": (4, 2, 8), "num_stages": (2, 1, 3, 4)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset({"warps"}), "triton": frozenset({"depth", "num_warps"})}
SHAPES = [
    {"segments": s, "longest": n, "channels": 4096} for s, n in ((1, 32), (8, 256), (32, 256), (32, 512), (32, 1024))
] + [{"segments": 32, "longest": 256, "channels": 1024}]
CANONICAL = {"segments": 32, "longest": 512}


def bucket(shape: Shape) -> dict[str, int]:
    """Everything rounded up to a power of two."""
    return {
        "segments": up(shape["segments"], 1, 1024),
        "longest": up(shape["longest"], 16, 65536),
        "channels": up(shape["channels"], 64, 16384),
    }


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on: the same channels in 32 segments of 512 tokens."""
    return {**CANONICAL, "channels": bucket(shape)["channels"]}


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    segments, longest, channels = shape["segments"], shape["longest"], shape["channels"]
    tile, item, tensor = knobs["tile"], size(dtype), dtype != "float32"
    warps = knobs.get("warps") or knobs["num_warps"]
    stages = knobs.get("stages") or knobs["num_stages"]
    threads = 32 * warps
    if gpu.sm < 80 and stages > 2:
        return f"{stages} stages need cp.async, which sm_{gpu.sm} lacks: 2 at most"
    depth = knobs.get("depth", 128 // item)
    sides = ceil(longest, tile)
    tiles = segments * sides * (sides + 1) // 2
    steps = ceil(channels, depth)
    rows = segments * longest
    flops = 2.0 * tiles * tile * tile * channels
    # With one stage a step waits for its loads; with more, loads of the next steps run under it.
    step = LATENCY / 2 / stages + 2 * barrier(threads) / stages + 20 * CYCLE
    gram = Work(
        blocks=tiles,
        threads=threads,
        registers=56 + ceil(tile * tile, threads),
        shared=stages * 2 * tile * depth * item + 16 * tile,
        bytes=float(rows * channels * item + 2 * rows * longest),
        flight=stages * 2.0 * tile * depth * item / threads,
        l2=2.0 * tiles * tile * channels * item,
        flops=flops,
        tensor=tensor,
        chain=LATENCY + steps * step,
        name="the Gram kernel",
    )
    rest = Work(
        blocks=rows,
        threads=128,
        registers=40,
        shared=512,
        bytes=4.0 * rows * longest,
        flight=16.0,
        flops=10.0 * rows * longest,
        chain=2 * LATENCY + 8 * barrier(128),
        name="the row kernel",
    )
    return [gram, rest, rest]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
