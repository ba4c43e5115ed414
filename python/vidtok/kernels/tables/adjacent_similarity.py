"""adjacent_similarity: a block of ``warps`` warps follows one slot over a run of frames.

Bytes: every row is read once, and once more where a run begins. CUDA keeps rows on their way in a ring of three in
shared memory; Triton's programs hold ``block`` channels of two rows in registers. More warps per block share a row
(fewer steps) and meet at one more barrier per frame. The cut of the channels over lanes fixes the order of the sums,
so every knob changes bits and depends on dtype, channels and the SM only.
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
    tokens, channels, item = shape["tokens"], shape["channels"], size(dtype)
    width = channels * item
    if backend == "cuda":
        threads, step, run = 32 * knobs["warps"], 512 * knobs["warps"], 1
        while run < 32 and tokens // (2 * run) >= 8 * gpu.sms:
            run *= 2
        ring = 768 + 3 * width
        shared = ring if ring <= gpu.shared_block else 768
        registers, each, ahead = 32, 16.0, 2.0 * ceil(width, step)
    else:
        threads, run, shared = 32 * knobs["num_warps"], 8, 128
        block = min(knobs["block"], max(16, 1 << (channels - 1).bit_length()))
        step = block * item
        if step < 4 * threads:
            return f"{threads} threads share {step} bytes of a step, less than 4 each"
        each, ahead = step / threads, 1.0
        registers = int(20 + 5.6 * block / threads)
    steps = ceil(width, step)
    # Frame after frame: rows on their way come while the frame before is summed, then its sums meet.
    frame = steps * 12 * CYCLE + 15 * 25 * CYCLE + barrier(threads)
    wait = 0.0 if backend == "cuda" else LATENCY * steps / 2
    return [
        Work(
            blocks=ceil(tokens, run),
            threads=threads,
            registers=registers,
            shared=shared,
            bytes=tokens * (width + 4) + ceil(tokens, run) * width,
            flight=each * ahead * min(1.0, width / (steps * step)),
            flops=6 * tokens * steps * step / item,
            chain=LATENCY + run * (frame + wait),
            name="the cosine",
        )
    ]


seconds = _model.timer(works)
candidates = _model.lister(works, KNOBS)
