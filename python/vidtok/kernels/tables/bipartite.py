"""bipartite: one block per sequence does everything, or a match launch of row strips and a merge launch.

One block (``one_block`` 1) saves a launch; its lists lie in shared memory, so long sequences do not fit, and few
sequences leave SMs idle while ``x`` moves. Two launches: a strip of ``tile`` sources, 16 per warp, meets the
destinations 64 at a time; the scores stay in registers. Triton's tiles are square. Bytes: metric once per launch,
strips again from the L2 cache, ``x`` read and written once. Registers are the compilers' (sm_80), for Triton a line
through them. In CUDA every product runs over the channels in order and no knob changes bits; in Triton the tile decides
which instructions multiply, so tile and warps are chosen on ``dim`` alone.
"""

from __future__ import annotations

from dataclasses import replace

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("batch", "tokens", "dim", "channels", "heads")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"one_block": (0, 1), "tile": (64, 32, 128)},
    "triton": {"tile": (64, 32), "num_warps": (4, 1, 2, 8), "num_stages": (2, 1, 3, 4)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset(), "triton": frozenset({"tile", "num_warps"})}
COLUMNS = 64  # destinations of a step of the CUDA kernel
SHAPES = [
    {"batch": b, "tokens": t, "dim": 64, "channels": c, "heads": 1}
    for t, c in ((256, 768), (1024, 1024))
    for b in (1, 32, 128)
] + [{"batch": 32, "tokens": 256, "dim": 64, "channels": 768, "heads": 16}]
CANONICAL = {"batch": 32, "tokens": 1024, "channels": 1024, "heads": 1}


def bucket(shape: Shape) -> dict[str, int]:
    """Batch, tokens and channels rounded up to a power of two; up to 260 tokens count as 256."""
    tokens = 256 if 128 < shape["tokens"] <= 260 else up(shape["tokens"], 32, 65536)
    return {
        "batch": up(shape["batch"], 1, 4096),
        "tokens": tokens,
        "dim": up(shape["dim"], 16, 8192),
        "channels": up(shape["channels"], 64, 8192),
        "heads": up(shape["heads"], 1, 32),
    }


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on: the same ``dim`` in 32 sequences of 1024 tokens."""
    return {name: CANONICAL.get(name, bucket(shape)[name]) for name in SHAPE}


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    batch, tokens, dim, heads = shape["batch"], shape["tokens"], shape["dim"], max(1, shape["heads"])
    # The mean over heads is fp32, and multiplies as such.
    tensor = dtype != "float32" and heads == 1
    item, half = size(dtype), ceil(tokens, 2)
    metric, x = batch * tokens * dim * item * heads, 2.0 * batch * tokens * shape["channels"] * item
    # Order of the sources: radix passes over half the tokens.
    select = 3 * (ceil(half, 256) * 12 * CYCLE + 4 * barrier(256))
    merge = Work(
        blocks=batch * ceil(tokens, 32),
        threads=256,
        registers=112,
        shared=8464 + 20 * 64 + 8 * 1024,
        bytes=x,
        flight=64.0 if backend == "cuda" else 16.0,
        chain=3 * LATENCY + select,
        name="the merge kernel",
    )
    tile, one = knobs["tile"], knobs.get("one_block", 0)
    if backend == "cuda":
        if one and tile != 64:
            return f"the one-block kernel has 8 warps of 16 sources, whatever the tile ({tile})"
        rows = 128 if one else tile
        threads, columns, wide = 2 * rows, COLUMNS, 4 if heads > 1 else item
        chunks = ceil(dim * wide, 128)
        held = chunks if chunks <= 4 else 2
        shared = 144 * (held * rows + 2 * columns) + 4 * rows + 600 + (40 * threads if gpu.sm < 80 else 0)
        registers = (136 if one else 128) if tensor else 168
    else:
        if tile > 32 and dtype == "float32":
            return f"fp32 products have tiles of at most 32 sources, not {tile}"
        tile = tile if tensor else 32
        threads, rows, columns, stages = 32 * knobs["num_warps"], tile, tile, knobs["num_stages"]
        depth = min(64, max(16, dim)) if tensor else 16
        chunks = ceil(dim, depth)
        shared = tile * depth * (4 if tensor else 4 * max(1, stages - 1))
        registers = 150 + ceil(11 * tile * depth, 2 * threads) if tensor else 80 + ceil(11 * tile * tile, 2 * threads)
    strips, steps = ceil(half, rows), ceil(half, columns) * chunks
    flops = 2.0 * batch * strips * rows * ceil(half, columns) * columns * dim
    step = LATENCY / 4 + 2 * barrier(threads) + 30 * CYCLE
    match = Work(
        blocks=batch * strips,
        threads=threads,
        registers=registers,
        shared=shared,
        bytes=float(metric),
        flight=32.0,
        l2=float(metric * (1 + strips) / 2),
        flops=flops,
        tensor=tensor,
        chain=2 * LATENCY + steps * step,
        name="the match kernel",
    )
    if not one:
        return [match, merge]
    return [
        replace(
            match,
            blocks=batch,
            shared=shared + merge.shared + 28 * tokens,
            bytes=metric + x,
            flight=64.0,
            chain=4 * LATENCY + strips * steps * step + select,
            name="the one-block kernel",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
