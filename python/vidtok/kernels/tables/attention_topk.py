"""attention_topk: the keys are cut in pieces of ``split``, one block per piece and key head; then one launch
combines the pieces and one selects.

Bytes: keys once, logits in fp32 written and read once. The query rows of a group share the keys; they are padded to
16 for tensor cores (fp32 inputs use FMA). Small pieces fill more SMs and leave more partial sums to combine, which
one block per head does in series; large pieces leave SMs idle. Shared memory: ``stages`` tiles of 64 keys (fewer
where the dimension is large), the queries, and 16 fp32 logits per key of the piece. ``split`` and the warps cut the
softmax sums, so they change bits and are chosen on the length, heads and dimension with one query row. Triton's
registers are a line through what its compiler reports on sm_80.
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
    warps = knobs.get("warps") or knobs["num_warps"]
    # Triton's compiler does not pipeline this loop: its shared memory is the same with any number of stages.
    stages = 2 if backend == "cuda" and gpu.sm >= 80 else 1
    threads, item, tensor = 32 * warps, size(dtype), dtype != "float32"
    queries = max(1, shape["q_heads"] // kv) * shape["rows"]
    groups = ceil(queries, 16)
    pieces = ceil(length, split)
    step = 64 if dim * item <= 512 else 32 if dim * item <= 1024 else 8
    tile = step * dim * item
    tiles = ceil(split, step)
    keys, logits = kv * length * dim * item, 4 * kv * queries * length
    flops = 2.0 * 16 * groups * kv * pieces * split * dim
    # A tile of keys is waited for unless the stages before it cover its way from memory.
    wait = LATENCY * (1 + (tiles - 1) / max(1, stages))
    if backend == "cuda":
        registers = 48 + ceil(16 * step, threads) + (0 if tensor else 16)
        shared = stages * tile + 4 * 16 * split + 16 * dim * item
    else:
        registers = 90 + ceil(80 * min(dim, 128), threads)
        shared = (step + 16) * (dim * item if tensor else min(128, 4 * dim))
    score = Work(
        blocks=kv * pieces * groups,
        threads=threads,
        registers=registers,
        shared=shared,
        bytes=keys + logits,
        flight=stages * tile / threads,
        l2=float(keys * groups + logits),
        flops=flops,
        tensor=tensor,
        chain=wait + tiles * (2 * barrier(threads) + step / warps * CYCLE) + 10 * BARRIER,
        name="the score kernel",
    )
    combine = Work(
        blocks=ceil(length, 1024),
        threads=256,
        registers=40,
        shared=2048,
        bytes=4.0 * length,
        flight=16.0,
        l2=logits + 8.0 * kv * queries * pieces * ceil(length, 1024),
        flops=4.0 * queries * kv * length,
        chain=2 * LATENCY + ceil(pieces, 32) * 20 * CYCLE * max(1, queries * kv // 8) + 2 * barrier(256),
        name="the combination",
    )
    return [score, combine]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
