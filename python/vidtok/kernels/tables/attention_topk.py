"""attention_topk: the keys are cut in pieces of ``split``, one block per piece and key head; then one launch
combines the pieces, one sums over heads and one selects.

Bytes: keys once, logits in fp32 written and read once. The query rows of a group share the keys; they are padded to 8,
16 or 32 (Triton: 16); fp32 inputs use FMA. Small pieces fill more SMs and leave more partial sums to combine, a warp
per row; large pieces leave SMs idle. A CUDA block takes 16 keys per warp at a time, in as many stages as the SM's
shared memory bears. ``split`` and the warps cut the softmax sums, so they change bits and are chosen on the length,
heads and dimension with one query row. Registers are the compilers' (sm_80), for Triton a line through them.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import BARRIER, CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("length", "q_heads", "kv_heads", "dim", "rows")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"split": (256, 64, 128, 512, 1024), "warps": (4, 1, 2, 8)},
    "triton": {"split": (256, 64, 128, 512, 1024), "num_warps": (4, 1, 2, 8), "num_stages": (2, 1, 3, 4)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset({"split", "warps"}), "triton": frozenset({"split", "num_warps"})}
# Registers per thread of the CUDA kernel by query rows of a block, as its compiler reports on sm_80: 16 bits, fp32.
REGISTERS = {8: (48, 48), 16: (63, 128), 32: (122, 181)}
SHAPES = [
    {"length": n, "q_heads": 28, "kv_heads": 4, "dim": 128, "rows": rows}
    for n, rows in ((1024, 1), (8192, 1), (32768, 1), (65536, 1), (8192, 16), (32768, 64))
] + [{"length": 16384, "q_heads": 32, "kv_heads": 8, "dim": 128, "rows": 1}]


def bucket(shape: Shape) -> dict[str, int]:
    """Length and rows rounded up to a power of two."""
    return {
        "length": up(shape["length"], 256, 1 << 20),
        "q_heads": shape["q_heads"],
        "kv_heads": shape["kv_heads"],
        "dim": up(shape["dim"], 16, 512),
        "rows": up(shape["rows"], 1, 256),
    }


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on: the same with one query row."""
    return {**bucket(shape), "rows": 1}


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    length, dim, kv, split = shape["length"], shape["dim"], shape["kv_heads"], knobs["split"]
    warps, item, tensor = knobs.get("warps") or knobs["num_warps"], size(dtype), dtype != "float32"
    threads, queries = 32 * warps, max(1, shape["q_heads"] // kv) * shape["rows"]
    if backend == "cuda":
        keys, rows = 16 * warps, 8 if queries <= 8 else 16 if queries <= 16 else 32
        if keys > split:
            return f"{warps} warps take {keys} keys at a time, more than the {split} of a piece"
        tensor = tensor and gpu.sm >= 80
        stages = 1 if gpu.sm < 80 else 2 if gpu.sm in (86, 89) else 3
        chunks, stage = ceil(dim * item, 256), 272 * (keys + rows)
        while stages > 1 and stages * stage + 4096 > gpu.shared_block:
            stages -= 1
        registers, shared = REGISTERS[rows][0 if item == 2 else 1], stages * stage + 8 * warps * rows
    else:
        # Triton's compiler does not pipeline this loop: its shared memory is the same with any number of stages.
        keys, rows, stages, chunks = min(64, split), 16, 1, 1
        registers = 90 + ceil(80 * min(dim, 128), threads)
        shared = stage = (keys + 16) * (min(dim, 256) * item if tensor else min(128, 4 * dim))
    pieces, groups, tiles = ceil(length, split), ceil(queries, rows), ceil(split, keys)
    logits = 4.0 * kv * queries * length
    # A tile of keys is waited for unless the stages before it cover its way from memory.
    wait = LATENCY * (1 + (tiles * chunks - 1) / stages / 2)
    score = Work(
        blocks=kv * pieces * groups,
        threads=threads,
        registers=registers,
        shared=shared,
        bytes=kv * length * dim * item + logits,
        flight=stages * stage / threads,
        l2=float(kv * length * dim * item * groups + logits),
        flops=2.0 * rows * groups * kv * pieces * tiles * keys * dim,
        tensor=tensor,
        chain=wait + tiles * chunks * (2 * barrier(threads) + 60 * CYCLE) + 10 * BARRIER,
        name="the score kernel",
    )
    combine = Work(
        blocks=ceil(kv * queries, 4),
        threads=128,
        registers=28,
        shared=0,
        bytes=8.0 * kv * queries * pieces,
        flight=8.0,
        chain=LATENCY * (1 + ceil(pieces, 32)) + 20 * CYCLE,
        name="the combination",
    )
    total = Work(
        blocks=ceil(length, 256),
        threads=256,
        registers=48,
        shared=0,
        bytes=logits + 4.0 * length,
        flight=16.0,
        flops=4.0 * kv * queries * length,
        chain=2 * LATENCY + kv * queries * 10 * CYCLE,
        name="the sum over heads",
    )
    return [score, combine, total]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
