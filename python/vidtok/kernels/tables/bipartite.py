"""bipartite: one block per sequence does everything, or a match launch of row strips and a merge launch.

One block (``one_block`` 1) saves a launch and holds the normalised metric, the best destinations and the order in
shared memory, so long sequences do not fit, and few sequences leave SMs idle while ``x`` moves. Two launches: a
strip of ``tile`` sources meets the destinations in tiles of ``tile``; the scores stay in registers
(``tile² / threads`` fp32 each). Bytes: metric once per launch, strips again from the L2 cache, ``x`` read and written
once. The warps cut the sums of norms over channels, so they change bits and are chosen on ``dim`` alone; tiles do not,
as every product runs over the channels in order.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("batch", "tokens", "dim", "channels", "heads")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"one_block": (0, 1), "tile": (64, 32, 128), "warps": (4, 1, 2, 8)},
    "triton": {"tile": (64, 32, 128), "num_warps": (4, 1, 2, 8), "num_stages": (2, 1, 3, 4)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset({"warps"}), "triton": frozenset({"num_warps"})}
MOST_IN_ONE = 260
SHAPES = [
    {"batch": b, "tokens": t, "dim": 64, "channels": c, "heads": 1}
    for t, c in ((256, 768), (1024, 1024))
    for b in (1, 32, 128)
] + [{"batch": 32, "tokens": 256, "dim": 64, "channels": 768, "heads": 16}]
CANONICAL = {"batch": 32, "tokens": 1024, "channels": 1024, "heads": 1}


def bucket(shape: Shape) -> dict[str, int]:
    """Batch, tokens and channels rounded up to a power of two; up to 260 tokens count as 256."""
    tokens = 256 if 128 < shape["tokens"] <= MOST_IN_ONE else up(shape["tokens"], 32, 65536)
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
    batch, tokens, dim = shape["batch"], shape["tokens"], shape["dim"]
    tile, one = knobs["tile"], knobs.get("one_block", 0)
    warps = knobs.get("warps") or knobs["num_warps"]
    threads, item, tensor = 32 * warps, size(dtype), dtype != "float32"
    stages = knobs.get("num_stages", 2 if gpu.sm >= 80 else 1)
    if one and tokens > MOST_IN_ONE:
        return f"one block takes sequences of at most {MOST_IN_ONE} tokens, this one has {tokens}"
    registers = 40 + ceil(tile * tile, threads)
    half = ceil(tokens, 2)
    strips = ceil(half, tile)
    metric = batch * tokens * dim * item * max(1, shape["heads"])
    x = 2.0 * batch * tokens * shape["channels"] * item
    flops = 2.0 * batch * (strips * tile) ** 2 * dim
    depth = min(dim, 64)
    steps = strips * ceil(dim, depth)
    # Order of the sources: a bitonic sort of half the tokens.
    log = max(1, (half - 1).bit_length())
    order = log * (log + 1) / 2 * (ceil(half, threads) * 8 * CYCLE + barrier(threads))
    step = 2 * barrier(threads) + LATENCY / 2 / stages + 30 * CYCLE
    if one:
        return [
            Work(
                blocks=batch,
                threads=threads,
                registers=registers,
                shared=tokens * (dim * item + 20),
                bytes=metric + x,
                flight=32.0,
                flops=flops,
                tensor=tensor,
                chain=4 * LATENCY + strips * steps * step / 2 + order,
                name="the one-block kernel",
            )
        ]
    match = Work(
        blocks=batch * strips,
        threads=threads,
        registers=registers,
        shared=tile * dim * item + stages * tile * depth * item + 8 * tile
        if dim <= 256
        else stages * 2 * tile * depth * item + 8 * tile,
        bytes=float(metric),
        flight=16.0 * stages,
        l2=float(metric * (1 + strips) / 2),
        flops=flops,
        tensor=tensor,
        chain=2 * LATENCY + steps * step + 4 * barrier(threads),
        name="the match kernel",
    )
    merge = Work(
        blocks=batch * ceil(tokens, 32),
        threads=256,
        registers=40,
        shared=min(8 * half, 32768),
        bytes=x,
        flight=32.0,
        chain=3 * LATENCY + log * (log + 1) / 2 * (ceil(half, 256) * 8 * CYCLE + barrier(256)),
        name="the merge kernel",
    )
    return [match, merge]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
