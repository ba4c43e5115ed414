"""adjacent_similarity: ``warps`` warps per token, whose lanes share the channels of the two rows.

Bytes: every row is read once from memory and once more from the L2 cache. More warps per token keep more bytes in
flight and wait at one more barrier. The cut of the channels over lanes fixes the order of the sums, so every knob
changes bits and depends on dtype, channels and the SM only.
"""

from __future__ import annotations

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import CYCLE, LATENCY, Knobs, Shape, Work, Works, barrier, ceil, size, up
from vidtok.kernels.tables.gpus import Gpu

SHAPE = ("tokens", "channels")
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"warps": (4, 1, 2, 8)},
    "triton": {"block": (1024, 256, 512, 2048, 4096), "num_warps": (4, 1, 2, 8)},
}
BITS: dict[str, frozenset[str]] = {"cuda": frozenset({"warps"}), "triton": frozenset({"block", "num_warps"})}
TOKENS = 8192  # on which every knob is chosen
SHAPES = [{"tokens": TOKENS, "channels": c} for c in (512, 1024, 2048, 4096, 8192)]


def bucket(shape: Shape) -> dict[str, int]:
    """Channels rounded up to a power of two; tokens take no part in the choice."""
    return {"tokens": TOKENS, "channels": up(shape["channels"], 64, 16384)}


def frozen(shape: Shape) -> dict[str, int]:
    """The shape that knobs which change bits are chosen on."""
    return bucket(shape)


def works(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> Works:
    """The launches of a call."""
    width = shape["channels"] * size(dtype)
    if backend == "cuda":
        threads, step = 32 * knobs["warps"], 512 * knobs["warps"]
    else:
        threads, step = 32 * knobs["num_warps"], knobs["block"] * size(dtype)
        if step < 4 * threads:
            return f"{threads} threads share {step} bytes of a step, less than 4 each"
    steps = ceil(width, step)
    each = max(4.0, step / threads)
    ahead = min(steps, 2) if backend == "cuda" else 1
    return [
        Work(
            blocks=shape["tokens"],
            threads=threads,
            registers=int(28 + 2 * ahead * each / 4 + (3 * each / size(dtype) if backend == "triton" else 6)),
            shared=0 if threads == 32 else 12 * (threads // 32),
            bytes=shape["tokens"] * (width + 4),
            flight=2 * ahead * each * min(1.0, width / (steps * step)),
            l2=2 * shape["tokens"] * width,
            flops=6 * shape["tokens"] * steps * step / size(dtype),
            chain=LATENCY * ceil(steps, ahead) / 2 + 15 * 25 * CYCLE + barrier(threads),
            name="the cosine",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
