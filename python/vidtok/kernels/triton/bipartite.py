"""Bipartite matching and merging of sets of tokens.

Two launches for sequences of a few strips: one program per sequence matches, selects and lists; then one program per
output adds its members up. Longer sequences match in a launch of their own, one program per strip of sources. Scores
live in registers: per source only the best destination is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.reference.bipartite import merge_count
from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    ceil_div,
    choice,
    cosine_key,
    cosine_steps,
    device_list,
    dot,
    inverse_norm,
    on_device,
    power_of_2,
    vector,
)
from vidtok.kernels.triton.topk_select import narrow

_TOKENS = ("tokens", "merges", "protected", "first")
_SIZES = ("heads", "dim", "by_batch", "by_head", "by_row", "total")
# Counts are not specialised on: a count of 1 would be no tensor, and each new divisor another compilation.
kernel = triton.jit(do_not_specialize=(*_TOKENS, *_SIZES, "last", "strips", "channels", "blocks"))

# A sequence of at most so many strips of sources is matched by the program that lists it.
_STRIPS = 4
# Tokens per step of the lists, sources ranked at once, members added at once.
_BLOCK, _RANKED, _MEMBERS = tl.constexpr(256), tl.constexpr(64), tl.constexpr(4)


# ---------------------------------------------------------------------- device functions
@triton.jit
def _sequence(cu, plan, b, tokens, merges):
    """(first token, tokens, merges, first output) of one sequence."""
    base = b.to(tl.int64) * tokens
    out = b.to(tl.int64) * (tokens - merges)
    if cu is not None:
        base = tl.load(cu + b).to(tl.int64)
        tokens = (tl.load(cu + b + 1) - base).to(tl.int32)
    if plan is not None:
        merges = tl.load(plan + 2 * b).to(tl.int32)
        out = tl.load(plan + 2 * b + 1)
    return base, tokens, merges, out


@triton.jit
def _free(mask, base, position, tokens, protected):
    """Where a position lies in the sequence and is not protected."""
    free = (position < tokens) & (position >= protected)
    if mask is not None:
        free = free & (tl.load(mask + base + position, mask=position < tokens, other=1) == 0)
    return free


@triton.jit
def _load(metric, at, inside, by_head, heads, HEADS: tl.constexpr):
    """Metric values; with ``HEADS`` their mean over the heads, in fp32."""
    x = tl.load(metric + at, mask=inside, other=0.0)
    if HEADS:
        x = x.to(tl.float32)
        for _ in range(1, heads):
            metric += by_head
            x += tl.load(metric + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.div_rn(x, heads.to(tl.float32) + tl.zeros_like(x))
    return x


@triton.jit
def _match_strip(
    metric, mask, state, base, tokens, protected, first, strip, heads, dim, by_head, by_row, total,
    HEADS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Best destination of each source of one strip, and its cosine in grid steps."""
    lane, step = tl.arange(0, TILE), tl.arange(0, DEPTH)
    source = first + 2 * (strip * TILE + lane)
    source_at = source.to(tl.int64) * by_row
    best = tl.full([TILE], -STEPS - 2, tl.int32)
    target = tl.full([TILE], 0, tl.int32)
    for j in range(first + 1, tokens, 2 * TILE):
        destination = j + 2 * lane
        destination_at = destination.to(tl.int64) * by_row
        products = tl.zeros([TILE, TILE], tl.float32)
        square, other = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for d in range(0, dim, DEPTH):
            depth = d + step
            a = _load(
                metric, source_at[:, None] + depth[None, :], (source < tokens)[:, None] & (depth < dim)[None, :],
                by_head, heads, HEADS,
            )  # fmt: skip
            b = _load(
                metric, destination_at[None, :] + depth[:, None],
                (destination < tokens)[None, :] & (depth < dim)[:, None], by_head, heads, HEADS,
            )  # fmt: skip
            products = dot(a, b, products)
            a, b = a.to(tl.float32), b.to(tl.float32)
            square += tl.sum(a * a, axis=1)
            other += tl.sum(b * b, axis=0)
        cosine = products * inverse_norm(square)[:, None] * inverse_norm(other)[None, :]
        key = cosine_key(cosine, STEPS)
        key = tl.where(_free(mask, base, destination, tokens, protected)[None, :], key, -STEPS - 2)
        # Key and column in one number: the largest has the best cosine and, among equals, the lowest column.
        packed = tl.max(key * TILE + (TILE - 1 - lane)[None, :], axis=1)
        found = tl.where(packed < 0, -((TILE - 1 - packed) // TILE), packed // TILE)
        better = found > best
        target = tl.where(better, j + 2 * (TILE - 1 - (packed & (TILE - 1))), target)
        best = tl.where(better, found, best)
    tl.store(state + base + source, best, mask=source < tokens)
    tl.store(state + total + base + source, target, mask=source < tokens)


@triton.jit
def _threshold(mask, state, base, tokens, protected, first, merges, STEPS: tl.constexpr):
    """(key of the last source that merges, how many with that very key do)."""
    prefix, wanted = tl.full([], 0, tl.uint32), merges
    for p in range(3):
        counts = tl.zeros([256], tl.int32)
        for i in range(first, tl.where(merges > 0, tokens, 0), 2 * _BLOCK):
            position = i + 2 * tl.arange(0, _BLOCK)
            free = _free(mask, base, position, tokens, protected)
            rest = (tl.load(state + base + position, mask=free, other=0) + (STEPS + 2)).to(tl.uint32) >> (16 - 8 * p)
            counts += tl.histogram((rest & 255).to(tl.int32), 256, mask=free & ((rest >> 8) == prefix))
        prefix, wanted = narrow(counts, prefix, wanted, 8)
    return prefix.to(tl.int32) - (STEPS + 2), wanted


@triton.jit
def _kinds(mask, base, tokens, protected):
    """How many tokens are protected, sources and destinations."""
    kept = tl.minimum(protected, tokens)
    sources, destinations = (tokens + 1) // 2 - (kept + 1) // 2, tokens // 2 - kept // 2
    if mask is not None:
        even, odd = tl.zeros([_BLOCK], tl.int32), tl.zeros([_BLOCK], tl.int32)
        for i in range(0, tokens, _BLOCK):
            position = i + tl.arange(0, _BLOCK)
            free = _free(mask, base, position, tokens, protected)
            even += (free & (position % 2 == 0)).to(tl.int32)
            odd += (free & (position % 2 == 1)).to(tl.int32)
        sources, destinations = tl.sum(even, axis=0), tl.sum(odd, axis=0)
        kept = tokens - sources - destinations
    return kept, sources, destinations


@triton.jit
def _list(
    mask, state, anchor, member, offset, cu_in, cu_out, b, base, tokens, merges, out, protected, first, total, last,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Select the sources that merge and write the lists of one sequence.

    ``state`` holds three numbers per token. Sources: cosine, target (−1: stays), rank among those of the same target.
    Destinations: how many join it, how many of these stand before it, where its members begin.
    """
    threshold, ties = _threshold(mask, state, base, tokens, protected, first, merges, STEPS)
    one, two, three = state + base, state + total + base, state + 2 * total + base
    kept, sources, _ = _kinds(mask, base, tokens, protected)
    anchor += out
    offset += out
    member += base
    begin = kept + sources - merges
    keeps, stays, joined, tied = tokens * 0, kept, begin, tokens * 0
    for i in range(0, tokens, _BLOCK):
        position = i + tl.arange(0, _BLOCK)
        free = _free(mask, base, position, tokens, protected)
        protects = (position < tokens) & (free == 0)
        source, destination = free & (position % 2 == 0), free & (position % 2 == 1)
        key = tl.load(one + position, mask=source & (merges > 0), other=0)
        tie = (source & (key == threshold)).to(tl.int32)
        chosen = (key > threshold) | ((tie > 0) & (tied + tl.cumsum(tie, axis=0) - tie < ties))
        merged = source & chosen & (merges > 0)
        stay = source & (merged == 0)
        # Three counts in one scan: a block holds fewer than 2¹⁰ tokens.
        kinds = protects.to(tl.int32) + (stay.to(tl.int32) << 10) + (destination.to(tl.int32) << 20)
        before = tl.cumsum(kinds, axis=0) - kinds
        to = tl.where(stay, stays + ((before >> 10) & 1023), joined + (before >> 20))
        to = tl.where(protects, keeps + (before & 1023), to)
        token = (base + position).to(tl.int32)
        tl.store(anchor + to, token, mask=protects | stay | destination)
        tl.store(offset + to, (base + to).to(tl.int32), mask=protects | stay)
        tl.store(member + to, token, mask=protects | stay)
        target = tl.load(two + position, mask=merged, other=-1)
        # Destinations begin with 0 in both counts.
        tl.store(two + position, tl.where(destination, 0, target), mask=position < tokens)
        tl.store(one + position, position * 0, mask=destination)
        whole = tl.sum(kinds, axis=0)
        keeps += whole & 1023
        stays += (whole >> 10) & 1023
        joined += whole >> 20
        tied += tl.sum(tie, axis=0)
    tl.debug_barrier()
    # How many sources of the same target come before each one. Integers: the atomics' order does not matter.
    lane = tl.arange(0, _RANKED)
    end = tl.where(merges > 0, tokens, 0)
    for i in range(first, end, 2 * _RANKED):
        position = i + 2 * lane
        target = tl.load(two + position, mask=position < tokens, other=-1)
        merged = target >= 0
        same = (target[:, None] == target[None, :]) & (lane[None, :] < lane[:, None])
        earlier = tl.atomic_add(one + target, position * 0, mask=merged, sem="relaxed")
        tl.store(three + position, earlier + tl.sum(same.to(tl.int32), axis=1), mask=merged)
        tl.debug_barrier()
        tl.atomic_add(one + target, position * 0 + 1, mask=merged, sem="relaxed")
        tl.atomic_add(two + target, position * 0 + 1, mask=merged & (position < target), sem="relaxed")
        tl.debug_barrier()
    # Where each destination's members begin.
    joined, start = begin, begin
    for i in range(first + 1, tokens, 2 * _BLOCK):
        position = i + 2 * tl.arange(0, _BLOCK)
        destination = _free(mask, base, position, tokens, protected)
        count = tl.where(destination, tl.load(one + position, mask=destination, other=0) + 1, 0)
        here = destination.to(tl.int32)
        at = start + tl.cumsum(count, axis=0) - count
        tl.store(three + position, at, mask=destination)
        tl.store(offset + joined + tl.cumsum(here, axis=0) - here, (base + at).to(tl.int32), mask=destination)
        before = tl.load(two + position, mask=destination, other=0)
        tl.store(member + at + before, (base + position).to(tl.int32), mask=destination)
        joined += tl.sum(here, axis=0)
        start += tl.sum(count, axis=0)
    tl.debug_barrier()
    for i in range(first, end, 2 * _BLOCK):
        position = i + 2 * tl.arange(0, _BLOCK)
        target = tl.load(two + position, mask=position < tokens, other=-1)
        merged = target >= 0
        at = tl.load(three + target, mask=merged, other=0) + tl.load(three + position, mask=merged, other=0)
        at += (position > target).to(tl.int32)
        tl.store(member + at, (base + position).to(tl.int32), mask=merged)
    tl.store(cu_in + b, base.to(tl.int32))
    tl.store(cu_out + b, out.to(tl.int32))
    is_last = b == last
    tl.store(cu_in + b + 1, (base + tokens).to(tl.int32), mask=is_last)
    tl.store(cu_out + b + 1, (out + tokens - merges).to(tl.int32), mask=is_last)
    tl.store(offset + tokens - merges, (base + tokens).to(tl.int32), mask=is_last)


# ---------------------------------------------------------------------- kernels
@kernel
def count_kinds(mask, cu, counts, tokens, total):
    """Per sequence of a mask: its bounds, sources and destinations."""
    b = tl.program_id(0)
    lo, hi = b.to(tl.int64) * tokens, (b + 1).to(tl.int64) * tokens
    if cu is not None:
        lo, hi = tl.load(cu + b).to(tl.int64), tl.load(cu + b + 1).to(tl.int64)
    tl.store(counts + 4 * b, lo.to(tl.int32))
    tl.store(counts + 4 * b + 1, hi.to(tl.int32))
    # The host refuses bad bounds; until then nothing is read outside the mask.
    lo, hi = tl.minimum(tl.maximum(lo, 0), total), tl.minimum(tl.maximum(hi, 0), total)
    _, sources, destinations = _kinds(mask, lo, (hi - lo).to(tl.int32), 0)
    tl.store(counts + 4 * b + 2, sources)
    tl.store(counts + 4 * b + 3, destinations)


@kernel
def match(
    metric, mask, cu, plan, state, tokens, merges, protected, first, heads, dim, by_batch, by_head, by_row, total,
    strips,
    HEADS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The best destinations of one strip of sources."""
    dim, by_batch, by_head, by_row = dim * UNIT, by_batch * UNIT, by_head * UNIT, by_row * UNIT
    total = total.to(tl.int64)
    b, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    base, tokens, merges, _ = _sequence(cu, plan, b, tokens, merges)
    metric += b.to(tl.int64) * by_batch
    if cu is not None:
        metric += base * by_row
    if (merges > 0) & (first + 2 * strip * TILE < tokens):
        _match_strip(
            metric, mask, state, base, tokens, protected, first, strip, heads, dim, by_head, by_row, total,
            HEADS, STEPS, TILE, DEPTH,
        )  # fmt: skip


@kernel
def list_one(
    mask, cu, plan, state, anchor, member, offset, cu_in, cu_out, tokens, merges, protected, first, total, last,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Selection and lists of one sequence whose strips are matched."""
    total = total.to(tl.int64)
    b = tl.program_id(0)
    base, tokens, merges, out = _sequence(cu, plan, b, tokens, merges)
    _list(
        mask, state, anchor, member, offset, cu_in, cu_out, b, base, tokens, merges, out, protected, first, total,
        last, STEPS,
    )  # fmt: skip


@kernel
def match_and_list(
    metric, mask, cu, plan, state, anchor, member, offset, cu_in, cu_out,
    tokens, merges, protected, first, heads, dim, by_batch, by_head, by_row, total, last,
    HEADS: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program does a whole sequence."""
    dim, by_batch, by_head, by_row = dim * UNIT, by_batch * UNIT, by_head * UNIT, by_row * UNIT
    total = total.to(tl.int64)
    b = tl.program_id(0)
    base, tokens, merges, out = _sequence(cu, plan, b, tokens, merges)
    metric += b.to(tl.int64) * by_batch
    if cu is not None:
        metric += base * by_row
    for strip in range(tl.where(merges > 0, tl.cdiv(tokens - first, 2 * TILE), 0)):
        _match_strip(
            metric, mask, state, base, tokens, protected, first, strip, heads, dim, by_head, by_row, total,
            HEADS, STEPS, TILE, DEPTH,
        )  # fmt: skip
    tl.debug_barrier()
    _list(
        mask, state, anchor, member, offset, cu_in, cu_out, b, base, tokens, merges, out, protected, first, total,
        last, STEPS,
    )  # fmt: skip


@kernel
def merge(
    x,
    size,
    member,
    offset,
    weight,
    y,
    mass,
    tokens,
    channels,
    by_batch,
    by_row,
    blocks,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Weights of one output's members and, over one block of channels, their weighted mean."""
    channels, by_batch, by_row = channels * UNIT, by_batch * UNIT, by_row * UNIT
    o, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    lo, hi = tl.load(offset + o), tl.load(offset + o + 1)
    lane = tl.arange(0, _MEMBERS)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([1], tl.float32)
    for j in range(lo, hi, _MEMBERS):
        there = j + lane < hi
        token = tl.load(member + j + lane, mask=there, other=0)
        share = there.to(tl.float32)
        if size is not None:
            share = tl.load(size + token, mask=there, other=0.0)
        total += tl.sum(share, axis=0)
        if x is not None:
            row = (token // tokens).to(tl.int64) * by_batch + (token % tokens).to(tl.int64) * by_row
            inside = there[:, None] & (channel < channels)[None, :]
            value = tl.load(x + row[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            sums += tl.sum(value * share[:, None], axis=0)
    if x is not None:
        token = tl.load(member + lo)
        row = (token // tokens).to(tl.int64) * by_batch + (token % tokens).to(tl.int64) * by_row
        alone = tl.load(x + row + channel, mask=channel < channels, other=0.0)
        # A token that met no other is copied bit for bit.
        mean = tl.div_rn(sums, total + tl.zeros([BLOCK], tl.float32)).to(x.dtype.element_ty)
        tl.store(y + o * channels + channel, tl.where(hi - lo == 1, alone, mean), mask=channel < channels)
    if block == 0:
        if mass is not None:
            tl.store(mass + o + tl.arange(0, 1), total)
        for j in range(lo, hi, _MEMBERS):
            there = j + lane < hi
            share = there.to(tl.float32)
            if size is not None:
                share = tl.load(size + tl.load(member + j + lane, mask=there, other=0), mask=there, other=0.0)
            tl.store(weight + j + lane, tl.div_rn(share, total + tl.zeros([_MEMBERS], tl.float32)), mask=there)


# ---------------------------------------------------------------------- host
class _Extent(NamedTuple):
    sequences: int
    total: int
    outputs: int
    longest: int
    merges: int  # of a dense batch
    plan: list[int] | None  # (merges, first output) of each sequence, where they differ


def _extent(metric: Tensor, r: int, protected: int, mask: Tensor | None, cu: Tensor | None) -> _Extent:
    """Counts that the outputs' shapes depend on. A mask and ``cu_seqlens`` are read here, in one sync."""
    tokens = metric.shape[-2]
    sequences = metric.shape[0] if cu is None else cu.shape[0] - 1
    total = sequences * tokens if cu is None else tokens
    below_2_31(total + 65536, "tokens and a block")

    def by_prefix(n: int) -> int:
        p = min(protected, n)
        return merge_count(r, n, p, (n + 1) // 2 - (p + 1) // 2, n // 2 - p // 2)

    if mask is None and cu is None:
        merges = by_prefix(tokens)
        return _Extent(sequences, total, sequences * (tokens - merges), tokens, merges, None)
    if mask is None or not sequences:
        numbers = [] if cu is None else cu.tolist()
        rows = [(lo, hi, 0, 0) for lo, hi in zip(numbers, numbers[1:])]
    else:
        counts = torch.empty(sequences, 4, dtype=torch.int32, device=metric.device)
        with on_device(metric):
            count_kinds[(sequences,)](mask.view(torch.uint8), cu, counts, tokens, total, **LAUNCH)
        rows = [tuple(row) for row in counts.tolist()]
    ends = [0, *(hi for _, hi, _, _ in rows)]
    if ends[-1] != total or any(lo != end or lo > hi for end, (lo, hi, _, _) in zip(ends, rows)):
        shown = [rows[0][0], *ends[1:12]] if rows else ends
        raise IndexError(f"expected cu_seqlens that start at 0, never fall and end at {total}, got {shown}")
    if mask is None:
        each = [by_prefix(hi - lo) for lo, hi, _, _ in rows]
    else:
        each = [merge_count(r, hi - lo, hi - lo - even - odd, even, odd) for lo, hi, even, odd in rows]
    if cu is None:
        merges = min(each, default=0)
        return _Extent(sequences, total, sequences * (tokens - merges), tokens, merges, None)
    plan, out = [], 0
    for merges, (lo, hi, _, _) in zip(each, rows):
        plan += [merges, out]
        out += hi - lo - merges
    return _Extent(
        sequences, total, out, max((hi - lo for lo, hi, _, _ in rows), default=0), max(each, default=0), plan
    )


def _shape(dtype: torch.dtype, heads: int, dim: int, tile: int, warps: int, unit: int) -> tuple[int, int]:
    """(tile, depth): no more than the warps' registers hold; fp32 products are FMA, which hold more of them."""
    if dtype == torch.float32 or heads > 1 or unit == 1:
        return min(tile, 32), 16
    return min(tile, 64 if warps >= 4 else 32), power_of_2(dim, 16, 64)


def _call(
    x: Tensor | None,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    if metric.dtype not in POINTER or (x is not None and x.dtype not in POINTER):
        return NotImplemented
    heads = metric.shape[-3] if metric.dim() == (4 if cu_seqlens is None else 3) else 1
    dim, by_row = metric.shape[-1], metric.stride(-2)
    by_head = metric.stride(-3) if heads > 1 else 0
    by_batch = metric.stride(0) if cu_seqlens is None else 0
    extent = _extent(metric, r, protected, mask, cu_seqlens)
    n, m, sequences = extent.total, extent.outputs, extent.sequences
    channels = 0 if x is None else x.shape[-1]

    def ints(count: int) -> Tensor:
        return metric.new_empty(count, dtype=torch.int32)

    cu_in, cu_out, anchor, member, offset = ints(sequences + 1), ints(sequences + 1), ints(m), ints(n), ints(m + 1)
    weight = metric.new_empty(n, dtype=torch.float32)
    y = None if x is None else x.new_empty(m, channels)
    mass = None if x is None else metric.new_empty(m, dtype=torch.float32)
    lists = (cu_in, cu_out, anchor, member, offset, weight)
    if sequences == 0:
        for t in (cu_in, cu_out, offset):
            t.zero_()
    else:
        # One shape for all batches: the tile decides which instructions multiply, and so the last bits.
        canonical = {"batch": 32, "tokens": 1024, "dim": dim, "channels": 1024, "heads": 1}
        knobs = choice("bipartite", metric, canonical)
        # One warp's registers do not hold a tile.
        warps = max(2, knobs["num_warps"])
        unit = vector(metric, dim, by_batch, by_head, by_row)
        tile, depth = _shape(metric.dtype, heads, dim, knobs["tile"], warps, unit)
        launch = {"num_warps": warps, "num_stages": knobs["num_stages"], **LAUNCH}
        state = ints(3 * n)
        plan = None if extent.plan is None else device_list(extent.plan, metric)
        kept = None if mask is None else mask.view(torch.uint8)
        protected = 0 if mask is not None else protected
        first = min(protected, extent.longest) // 2 * 2
        strips = ceil_div(max(extent.longest - first, 0), 2 * tile)
        steps = int(cosine_steps(metric.dtype))
        outputs = (anchor, member, offset, cu_in, cu_out)
        tokens = (metric.shape[-2], extent.merges, protected, first)
        sizes = (heads, dim // unit, by_batch // unit, by_head // unit, by_row // unit, n)
        form = {"HEADS": heads > 1, "STEPS": steps, "TILE": tile, "DEPTH": depth, "UNIT": unit}
        with on_device(metric):
            if extent.merges and strips <= _STRIPS:
                match_and_list[(sequences,)](
                    metric, kept, cu_seqlens, plan, state, *outputs, *tokens, *sizes, sequences - 1, **form, **launch
                )
            else:
                if extent.merges:
                    match[(sequences * strips,)](
                        metric, kept, cu_seqlens, plan, state, *tokens, *sizes, strips, **form, **launch
                    )
                list_one[(sequences,)](
                    kept, cu_seqlens, plan, state, *outputs, *tokens, n, sequences - 1, STEPS=steps, **LAUNCH
                )
            if m:
                block = power_of_2(channels, 1, 1024)
                blocks = max(1, ceil_div(channels, block))
                rows = max(n, 1) if cu_seqlens is not None else metric.shape[-2]
                source = None if x is None or not channels else x
                by_batch, by_row, unit = 0, 0, 1
                if source is not None:
                    by_batch, by_row = (source.stride(0) if cu_seqlens is None else 0), source.stride(-2)
                    unit = vector(source, channels, by_batch, by_row)
                moved = (rows, channels // unit, by_batch // unit, by_row // unit, blocks)
                merge[(m * blocks,)](
                    source, size, member, offset, weight, y, mass, *moved, BLOCK=block, UNIT=unit, **LAUNCH
                )
    return lists if x is None else (y, mass, *lists)


def bipartite_match(
    metric: Tensor, r: int, size: Tensor | None, protected: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_match`."""
    return _call(None, metric, r, size, protected, mask, cu_seqlens)


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    size: Tensor | None,
    protected: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Any:
    """See :func:`vidtok.kernels.reference.bipartite.bipartite_merge`."""
    return _call(x, metric, r, size, protected, mask, cu_seqlens)


def specimens() -> list[Specimen]:
    """Each kernel in each dtype; matching with one head and with several, dense and ragged."""
    found = []
    tokens, sizes = dict.fromkeys(_TOKENS, "i32"), dict.fromkeys(_SIZES, "i32")
    lists = dict.fromkeys(("state", "anchor", "member", "offset", "cu_in", "cu_out"), "*i32")
    ragged = {"mask": "*u8", "cu": "*i32", "plan": "*i64"}
    dense = dict.fromkeys(ragged)
    for dtype, pointer in POINTER.items():
        name, wide = str(dtype).removeprefix("torch."), 16 // dtype.itemsize
        for heads, warps, unit in ((1, 4, wide), (16, 4, wide), (1, 2, wide), (1, 8, wide), (1, 4, 1), (16, 4, 1)):
            tile, depth = _shape(dtype, heads, 64, 64, warps, unit)
            form = {"HEADS": heads > 1, "STEPS": int(cosine_steps(dtype)), "TILE": tile, "DEPTH": depth, "UNIT": unit}
            kind = f"{heads} heads {name}, warps {warps}, unit {unit}"
            whole = {"metric": pointer, **lists, **tokens, **sizes, "last": "i32"}
            strip = {"metric": pointer, **ragged, "state": "*i32", **tokens, **sizes, "strips": "i32"}
            found += [
                Specimen(f"bipartite match and list {kind}", match_and_list, whole, {**dense, **form}, warps, 2),
                Specimen(f"bipartite match ragged {kind}", match, strip, form, warps, 2),
            ]
        moved = dict.fromkeys(("tokens", "channels", "by_batch", "by_row", "blocks"), "i32")
        pointers = {"x": pointer, "y": pointer, "size": "*fp32", "member": "*i32", "offset": "*i32"}
        pointers |= {"weight": "*fp32", "mass": "*fp32"}
        found += [
            Specimen(f"bipartite merge {name}, unit {u}", merge, {**pointers, **moved}, {"BLOCK": 1024, "UNIT": u})
            for u in (wide, 1)
        ]
    listed = {**ragged, **lists, **tokens, "total": "i32", "last": "i32"}
    counted = {"mask": "*u8", "cu": "*i32", "counts": "*i32", "tokens": "i32", "total": "i32"}
    return [
        *found,
        Specimen("bipartite lists", list_one, listed, {"STEPS": 2**20}),
        Specimen("bipartite counts", count_kinds, counted, {}),
    ]
