"""cluster_dpc_knn: a Gram sweep over upper-triangle tiles, then densities, parents, centres and assignment.

The sweep does ``2 · tile² · channels`` FLOP per tile on tensor cores (FMA for fp32) over steps of 128 bytes of
channels (Triton: ``depth``), ``stages`` of them in flight; rows come again from the L2 cache for every tile. Large
tiles read less, hold more registers and leave SMs idle on small segments. Pipelines deeper than two need
cp.async, which sm_70 lacks. The other launches read the distances kept in a workspace. In CUDA every product runs over
the channels in order and no knob changes bits; Triton's depth and the warps of its norms cut sums and its tile decides
which instructions multiply (wgmma from 64 on sm_90), so they depend on the channels only.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("segments", "longest", "channels")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"tile": (64, 32, 128), "warps": (4, 8), "stages": (2, 1, 3, 4)},
    "triton": {"tile": (64, 32, 128), "depth": (64, 32, 128), "num_warps": (4, 2, 8), "num_stages": (2, 1, 3, 4)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset({"depth", "num_warps", "tile"})}
SHAPES = [
    {"segments": s, "longest": n, "channels": 4096} for s, n in ((1, 32), (8, 256), (32, 256), (32, 512), (32, 1024))
] + [{"segments": 32, "longest": 256, "channels": 1024}]
# Registers per thread of the CUDA kernel by (tile, warps), the most of sm_80 to sm_90: 16-bit inputs, fp32.
REGISTERS = {(32, 4): (91, 96), (64, 4): (156, 168), (64, 8): (110, 128), (128, 8): (229, 255)}
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
    if backend == "cuda":
        warps, stages, depth = knobs["warps"], knobs["stages"], 128 // item
        if (tile, warps) not in REGISTERS:
            allowed = " or ".join(str(w) for t, w in REGISTERS if t == tile)
            return f"tiles of {tile} are made by {allowed} warps, not {warps}"
        if gpu.sm < 80 and stages > 2:
            return f"{stages} stages need cp.async, which sm_{gpu.sm} lacks: 2 at most"
        if gpu.sm < 80 and tensor and tile == 128:
            return f"sums of a tile of 128 halves do not fit the registers of sm_{gpu.sm}: 64 at most"
        registers = REGISTERS[tile, warps][0 if tensor else 1]
        shared = stages * 2 * tile * (144 if gpu.sm < 80 and tensor else 128) + 8 * tile + 256
    else:
        warps, stages, depth = knobs["num_warps"], knobs["num_stages"], knobs["depth"]
        registers = 40 + ceil(tile * (13 * tile + 11 * depth), 64 * warps)
        shared = max(1, stages - 1) * 2 * tile * depth * item
    threads = 32 * warps
    sides, steps, rows = ceil(longest, tile), ceil(channels, depth), segments * longest
    tiles = segments * sides * (sides + 1) // 2
    # With one stage a step waits for its loads; with more, loads of the next steps run under it.
    step = LATENCY / 2 / stages + 2 * barrier(threads) / stages + 20 * CYCLE
    gram = Work(
        blocks=tiles,
        threads=threads,
        registers=registers,
        shared=shared,
        bytes=float(rows * channels * item + 2 * rows * longest),
        flight=stages * 2.0 * tile * depth * item / threads,
        l2=2.0 * tiles * tile * channels * item,
        flops=2.0 * tiles * tile * tile * channels,
        tensor=tensor,
        chain=LATENCY + steps * step,
        name="the Gram kernel",
    )
    row = Work(
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
    return [gram, row, row]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
