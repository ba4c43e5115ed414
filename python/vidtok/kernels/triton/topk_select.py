"""Exact top-k per segment: the threshold by counting digits of order keys, then a stable compaction."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    best_digit,
    ceil_div,
    check,
    choice,
    code_of,
    device_list,
    error_words,
    on_device,
    order_key,
    report,
)

# Segments longer than this on average are shared by several programs.
ONE_PROGRAM = 1 << 15
_CHUNK, _MOST_CHUNKS = 1 << 14, 64
# (bits of a digit, digits of a key); a histogram in Triton costs each warp time in proportion to its bins.
DIGITS = {torch.float32: (8, 4), torch.bfloat16: (8, 2), torch.float16: (8, 2)}

# Counts are not specialised on: a count of 1 would be no tensor, and each new divisor another compilation.
kernel = triton.jit(do_not_specialize=("segments", "total", "keep", "chunks"))

_KEEP = tl.constexpr(code_of("topk_select", "keep"))
_OFFSETS = tl.constexpr(code_of("topk_select", "cu_seqlens"))


# ---------------------------------------------------------------------- device functions
@triton.jit
def _segment(cu, keep_start, out, error, segment, segments, total, keep, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    """(start, length, how many to keep, where they go); a bad segment is reported, answered by zeros and empty."""
    lo, hi = segment.to(tl.int64) * 0, total.to(tl.int64)
    bad_bounds = segment < 0
    if cu is not None:
        at, stop = tl.load(cu + segment).to(tl.int64), tl.load(cu + segment + 1).to(tl.int64)
        lo, hi = tl.minimum(tl.maximum(at, 0), total), tl.minimum(tl.maximum(stop, 0), total)
        bad_bounds = (at != lo) | (stop != hi) | (lo > hi)
        bad_bounds = bad_bounds | ((segment == 0) & (at != 0)) | ((segment == segments - 1) & (stop != total))
        if WRITES:
            report(error, _OFFSETS, tl.where(at != lo, at, stop), lo, hi + 1, bad_bounds)
        hi = tl.maximum(lo, hi)
    base, k = segment.to(tl.int64) * keep, segment.to(tl.int64) * 0 + keep
    if keep_start is not None:
        base = tl.load(keep_start + segment).to(tl.int64)
        k = tl.load(keep_start + segment + 1).to(tl.int64) - base
    length = hi - lo
    bad = (k < 0) | (k > length)
    if WRITES:
        report(error, _KEEP, k, lo * 0, length + 1, bad & (bad_bounds == 0))
        for i in range(0, tl.where(bad, k, 0), BLOCK):
            place = i + tl.arange(0, BLOCK)
            tl.store(out + base + place, tl.zeros([BLOCK], tl.int64), mask=place < k)
    k = tl.where(bad, 0, k)
    return lo, tl.where(k > 0, length, 0).to(tl.int32), k.to(tl.int32), base


@triton.jit
def digit_counts(score, count, prefix, shift, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """How often each value of the digit at ``shift`` occurs in score[:count] among keys that begin with ``prefix``."""
    counts = tl.zeros([1 << BITS], tl.int32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        # The first digit has nothing before it, and the prefix is 0.
        rest = order_key(tl.load(score + at, mask=at < count, other=0.0)) >> shift
        active = (at < count) & ((rest >> BITS) == prefix)
        counts += tl.histogram((rest & ((1 << BITS) - 1)).to(tl.int32), 1 << BITS, mask=active)
    return counts


@triton.jit
def narrow(counts, prefix, wanted, BITS: tl.constexpr):
    """The prefix with one more digit, and how many are still wanted among keys that begin with it."""
    digit, above = best_digit(counts, wanted, 1 << BITS)
    return (prefix << BITS) | digit.to(tl.uint32), wanted - above


@triton.jit
def emit(score, position, out, start, count, threshold, ties, greater_before, ties_before, BLOCK: tl.constexpr):
    """Write the chosen indices of score[start:][:count]: keys above the threshold, the first ``ties`` equal to it."""
    score += start
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        active = at < count
        key = order_key(tl.load(score + at, mask=active, other=0.0))
        greater, tie = active & (key > threshold), active & (key == threshold)
        # Both counts in one scan: a block holds fewer than 2¹⁶ keys.
        both = greater.to(tl.int32) + (tie.to(tl.int32) << 16)
        seen = tl.cumsum(both, axis=0)
        before = seen - both
        tied = ties_before + (before >> 16)
        chosen = greater | (tie & (tied < ties))
        to = greater_before + (before & 0xFFFF) + tl.minimum(tied, ties)
        index = start + at
        if position is not None:
            index = tl.load(position + index, mask=chosen, other=0).to(tl.int64)
        tl.store(out + to, index, mask=chosen)
        whole = tl.sum(both, axis=0)
        greater_before += whole & 0xFFFF
        ties_before += whole >> 16


# ---------------------------------------------------------------------- kernels
@kernel
def select_one(
    score, cu, keep_start, position, out, error, segments, total, keep,
    BITS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per segment does everything."""
    segment = tl.program_id(0)
    lo, length, k, base = _segment(cu, keep_start, out, error, segment, segments, total, keep, True, BLOCK)
    prefix, wanted = tl.full([], 0, tl.uint32), k
    for p in range(PASSES):
        counts = digit_counts(score + lo, length, prefix, (PASSES - 1 - p) * BITS, BITS, BLOCK)
        prefix, wanted = narrow(counts, prefix, wanted, BITS)
    none = tl.full([], 0, tl.int32)
    emit(score, position, out + base, lo, length, prefix, wanted, none, none, BLOCK)


@triton.jit
def _replay(digits, wanted, PASSES: tl.constexpr, BITS: tl.constexpr):
    """Prefix and wanted after the passes that are finished."""
    prefix = tl.full([], 0, tl.uint32)
    for p in range(PASSES):
        counts = tl.load(digits + p * (1 << BITS) + tl.arange(0, 1 << BITS))
        prefix, wanted = narrow(counts, prefix, wanted, BITS)
    return prefix, wanted


@triton.jit
def _part(lo, length, chunk, chunks, BLOCK: tl.constexpr):
    """(start, length) of a chunk."""
    each = tl.cdiv(tl.cdiv(length, chunks), BLOCK) * BLOCK
    start = tl.minimum(chunk.to(tl.int64) * each, length)
    return lo + start, tl.minimum(each, length - start).to(tl.int32)


@kernel
def count_digits(
    score, cu, keep_start, out, error, digits, segments, total, keep, chunks,
    PASS: tl.constexpr, BITS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One digit's counts over one chunk of a segment, added to the segment's."""
    segment, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lo, length, k, _ = _segment(cu, keep_start, out, error, segment, segments, total, keep, False, BLOCK)
    digits += segment.to(tl.int64) * (PASSES << BITS)
    prefix, _ = _replay(digits, k, PASS, BITS)
    start, count = _part(lo, length, chunk, chunks, BLOCK)
    counts = digit_counts(score + start, count, prefix, (PASSES - 1 - PASS) * BITS, BITS, BLOCK)
    # Integers: the order of the additions does not matter.
    tl.atomic_add(digits + PASS * (1 << BITS) + tl.arange(0, 1 << BITS), counts, mask=counts > 0, sem="relaxed")


@kernel
def count_chosen(
    score, cu, keep_start, out, error, digits, before, segments, total, keep, chunks,
    BITS: tl.constexpr, PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per chunk, how many keys lie above the threshold and how many equal it."""
    segment, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lo, length, k, _ = _segment(cu, keep_start, out, error, segment, segments, total, keep, False, BLOCK)
    prefix, _ = _replay(digits + segment.to(tl.int64) * (PASSES << BITS), k, PASSES, BITS)
    start, count = _part(lo, length, chunk, chunks, BLOCK)
    score += start
    greater, ties = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        active = at < count
        key = order_key(tl.load(score + at, mask=active, other=0.0))
        greater += (active & (key > prefix)).to(tl.int32)
        ties += (active & (key == prefix)).to(tl.int32)
    before += tl.program_id(0).to(tl.int64) * 2
    tl.store(before, tl.sum(greater, axis=0))
    tl.store(before + 1, tl.sum(ties, axis=0))


@kernel
def emit_chunk(
    score, cu, keep_start, position, out, error, digits, before, segments, total, keep, chunks,
    BITS: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen indices of one chunk, behind those of the chunks before it."""
    segment, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lo, length, k, base = _segment(cu, keep_start, out, error, segment, segments, total, keep, True, BLOCK)
    prefix, wanted = _replay(digits + segment.to(tl.int64) * (PASSES << BITS), k, PASSES, BITS)
    start, count = _part(lo, length, chunk, chunks, BLOCK)
    place = tl.arange(0, CHUNKS)
    earlier = before + (segment.to(tl.int64) * chunks + place) * 2
    greater = tl.sum(tl.load(earlier, mask=place < chunk, other=0), axis=0)
    ties = tl.sum(tl.load(earlier + 1, mask=place < chunk, other=0), axis=0)
    emit(score, position, out + base, start, count, prefix, wanted, greater, ties, BLOCK)


# ---------------------------------------------------------------------- host
def select_into(
    out: Tensor,
    score: Tensor,
    keep: list[int],
    cu: Tensor | None,
    segments: int,
    position: Tensor | None = None,
) -> None:
    """Fill ``out`` with the ``keep`` best of each segment, looked up in ``position`` where that is given."""
    total, k = score.shape[0], keep[0] if len(keep) == 1 else 0
    starts = None if len(keep) == 1 else device_list([0, *accumulate(keep)], score)
    knobs = choice("topk_select", score, {"segments": segments, "longest": ceil_div(total, segments)})
    block = knobs["block"]
    bits, passes = DIGITS[score.dtype]
    error = error_words(score)
    digit: dict[str, Any] = {"BITS": bits, "PASSES": passes, "BLOCK": block}
    launch = {"num_warps": knobs["num_warps"], **LAUNCH}
    with on_device(score):
        if total <= ONE_PROGRAM * segments:
            select_one[(segments,)](
                score, cu, starts, position, out, error, segments, total, k, **digit, **launch
            )  # fmt: skip
        else:
            chunks = min(ceil_div(total, _CHUNK * segments), _MOST_CHUNKS)
            digits = torch.zeros(segments * (passes << bits), dtype=torch.int32, device=score.device)
            before = torch.empty(segments * chunks * 2, dtype=torch.int32, device=score.device)
            grid = (segments * chunks,)
            for p in range(passes):
                count_digits[grid](
                    score, cu, starts, out, error, digits, segments, total, k, chunks, PASS=p, **digit, **launch
                )
            count_chosen[grid](
                score, cu, starts, out, error, digits, before, segments, total, k, chunks, **digit, **launch
            )
            emit_chunk[grid](
                score, cu, starts, position, out, error, digits, before, segments, total, k, chunks,
                CHUNKS=_MOST_CHUNKS, **digit, **launch,
            )  # fmt: skip
    check(score)


def topk_select(score: Tensor, keep: list[int], cu_seqlens: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.topk_select.topk_select`."""
    if score.dtype not in DIGITS:
        return NotImplemented
    # A loop over a segment steps past its end by at most a block.
    below_2_31(score.shape[0] + 65536, "scores and a block")
    segments = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if min(keep, default=0) < 0:
        raise ValueError(f"expected keep of at least 0, got {min(keep)}")
    count = keep[0] * segments if len(keep) == 1 else sum(keep)
    out = score.new_empty(count, dtype=torch.int64)
    if segments:
        select_into(out, score, keep, cu_seqlens, segments)
    return out


def specimens() -> list[Specimen]:
    """Each kernel in each dtype."""
    found = []
    numbers = {"segments": "i32", "total": "i32", "keep": "i32"}
    for dtype, (bits, passes) in DIGITS.items():
        name, block = str(dtype).removeprefix("torch."), {"BLOCK": 1024}
        pointers = {"score": POINTER[dtype], "cu": "*i32", "keep_start": "*i64", "out": "*i64", "error": "*i32"}
        digit = {"BITS": bits, "PASSES": passes, **block}
        shared = {**numbers, "digits": "*i32", "chunks": "i32"}
        found += [
            Specimen(f"topk_select one {name}", select_one, {**pointers, **numbers}, {"position": None, **digit}),
            Specimen(f"topk_select digits {name}", count_digits, {**pointers, **shared}, {"PASS": passes - 1, **digit}),
            Specimen(f"topk_select counts {name}", count_chosen, {**pointers, **shared, "before": "*i32"}, digit),
            Specimen(
                f"topk_select emit {name}",
                emit_chunk,
                {**pointers, **shared, "before": "*i32"},
                {"position": None, "CHUNKS": _MOST_CHUNKS, **digit},
            ),
        ]
    return found
