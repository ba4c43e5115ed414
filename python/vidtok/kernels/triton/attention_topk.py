"""Attention importance of keys cut into splits of fixed length, and the best of each group of spans.

Three launches: logits with the maximum and the sum of every split; their combination, in index order, with the
scores; the selection. Where many query rows share the keys, logits would outweigh the keys themselves: then they
are computed a second time instead of being kept, and the combination is a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels import spans
from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    ceil_div,
    choice,
    device_list,
    dot,
    exp_not_above_0,
    on_device,
    power_of_2,
    round_16_bits,
    vector,
)
from vidtok.kernels.triton.topk_select import select_into

_INTEGERS = (
    "kv_heads", "rows", "width", "length", "dim", "splits", "tiles", "plane", "by_batch", "by_head", "by_row", "blocks",
)  # fmt: skip
# Counts are not specialised on: a count of 1 would be no tensor, and each new divisor another compilation.
kernel = triton.jit(do_not_specialize=_INTEGERS)

# Keys per step of the first launch, columns per program of the second, partials loaded at once.
_KEYS, _COLUMNS, _AT_ONCE = 64, 512, tl.constexpr(32)


# ---------------------------------------------------------------------- device functions
@triton.jit
def _logits(
    query, key, mask, position, row, rows, column, stop, width, length, dim, by_row, scale, batch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Scaled products of a tile of query rows and keys, −inf where a key is not seen, and what is seen."""
    step = tl.arange(0, BLOCK_D)
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in range(STEPS):
        depth = d * BLOCK_D + step
        q_at = row.to(tl.int64)[:, None] * dim + depth[None, :]
        k_at = column.to(tl.int64)[None, :] * by_row + depth[:, None]
        q = tl.load(query + q_at, mask=(row < rows)[:, None] & (depth < dim)[None, :], other=0.0)
        k = tl.load(key + k_at, mask=(column < stop)[None, :] & (depth < dim)[:, None], other=0.0)
        products = dot(q, k, products)
    seen = (row < rows)[:, None] & (column < stop)[None, :]
    if mask is not None:
        seen = seen & (tl.load(mask + batch.to(tl.int64) * length + column, mask=column < stop, other=0) != 0)[None, :]
    if position is not None:
        at = tl.load(position + batch.to(tl.int64) * width + row % width, mask=row < rows, other=-1)
        seen = seen & (column[None, :] <= at[:, None])
    return tl.where(seen, products * scale, float("-inf")), seen


@triton.jit
def _combine(partial, row, rows, plane, splits, BLOCK_M: tl.constexpr):
    """(maximum, 1/sum, whether any key is seen) of whole rows from those of their splits, in index order."""
    at = tl.arange(0, _AT_ONCE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    some = tl.zeros([BLOCK_M], tl.float32)
    partial += row.to(tl.int64)[:, None] * splits + at[None, :]
    for s in range(0, splits, _AT_ONCE):
        there = (row < rows)[:, None] & (s + at < splits)[None, :]
        top = tl.maximum(top, tl.max(tl.load(partial + s, mask=there, other=float("-inf")), axis=1))
        some = tl.maximum(some, tl.max(tl.load(partial + 2 * plane + s, mask=there, other=0.0), axis=1))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    for s in range(0, splits, _AT_ONCE):
        there = (row < rows)[:, None] & (s + at < splits)[None, :]
        share = exp_not_above_0(tl.load(partial + s, mask=there, other=float("-inf")) - top[:, None])
        total += tl.sum(share * tl.load(partial + plane + s, mask=there, other=0.0), axis=1)
    return top, tl.div_rn(1.0, total), some


# ---------------------------------------------------------------------- kernels
@kernel
def split_sums(
    query, key, mask, position, partial, logit,
    kv_heads, rows, width, length, dim, splits, tiles, plane, by_batch, by_head, by_row, scale,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of one split of the keys of one head, for one tile of query rows."""
    dim, by_batch, by_head, by_row = dim * UNIT, by_batch * UNIT, by_head * UNIT, by_row * UNIT
    plane = plane.to(tl.int64)
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, head = rest % tiles, rest // tiles
    batch = head // kv_heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key += batch.to(tl.int64) * by_batch + (head % kv_heads).to(tl.int64) * by_head
    query += head.to(tl.int64) * rows * dim
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, length)
    first = head.to(tl.int64) * rows
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, some = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n in range(start, stop, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        x, seen = _logits(
            query, key, mask, position, row, rows, column, stop, width, length, dim, by_row, scale, batch,
            BLOCK_M, BLOCK_N, BLOCK_D, STEPS,
        )  # fmt: skip
        if logit is not None:
            at = (first + row)[:, None] * length + column[None, :]
            tl.store(logit + at, x, mask=(row < rows)[:, None] & (column < stop)[None, :])
        higher = tl.maximum(top, tl.max(x, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.where(seen, exp_not_above_0(x - base[:, None]), 0.0)
        total = total * exp_not_above_0(top - base) + tl.sum(share, axis=1)
        some = tl.maximum(some, tl.max(seen.to(tl.float32), axis=1))
        top = higher
    partial += (first + row) * splits + split
    tl.store(partial, top, mask=row < rows)
    tl.store(partial + plane, total, mask=row < rows)
    tl.store(partial + 2 * plane, some, mask=row < rows)


@kernel
def combine(partial, whole, rows, plane, splits, BLOCK_M: tl.constexpr):
    """The combination alone: three numbers per row."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top, inverse, some = _combine(partial, row, rows, plane.to(tl.int64), splits, BLOCK_M)
    whole += row.to(tl.int64) * 3
    tl.store(whole, top, mask=row < rows)
    tl.store(whole + 1, inverse, mask=row < rows)
    tl.store(whole + 2, some, mask=row < rows)


@kernel
def scores(
    query, key, mask, position, partial, whole, logit, piece, score, packed, place,
    kv_heads, rows, width, length, dim, splits, tiles, plane, by_batch, by_head, by_row, scale, blocks,
    USE_MAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Scores of a block of one span's keys, over all heads and query rows in order."""
    dim, by_batch, by_head, by_row = dim * UNIT, by_batch * UNIT, by_head * UNIT, by_row * UNIT
    plane = plane.to(tl.int64)
    piece += tl.program_id(0) // blocks * 5
    batch, lo, hi = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    begin = (tl.program_id(0) % blocks) * BLOCK_N
    if lo + begin < hi:
        offset = begin + tl.arange(0, BLOCK_N)
        column = (lo + offset).to(tl.int32)
        out = tl.zeros([BLOCK_N], tl.float32)
        worst = tl.zeros([BLOCK_N], tl.int32)
        used = tl.zeros([BLOCK_M], tl.float32)
        for t in range(kv_heads * tiles):
            head = batch * kv_heads + t // tiles
            row = (t % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            first = head.to(tl.int64) * rows
            if logit is not None:
                top, inverse, some = _combine(partial + first * splits, row, rows, plane, splits, BLOCK_M)
                at = (first + row)[:, None] * length + column[None, :]
                x = tl.load(logit + at, mask=(row < rows)[:, None] & (column < hi)[None, :], other=float("-inf"))
            else:
                at = whole + (first + row) * 3
                top = tl.load(at, mask=row < rows, other=0.0)
                inverse = tl.load(at + 1, mask=row < rows, other=0.0)
                some = tl.load(at + 2, mask=row < rows, other=0.0)
                x, _ = _logits(
                    query + first * dim, key + batch.to(tl.int64) * by_batch + (t // tiles).to(tl.int64) * by_head,
                    mask, position, row, rows, column, hi.to(tl.int32), width, length, dim, by_row, scale, batch,
                    BLOCK_M, BLOCK_N, BLOCK_D, STEPS,
                )  # fmt: skip
            share = exp_not_above_0(x - top[:, None]) * inverse[:, None]
            share = tl.where((some > 0.0)[:, None], share, 0.0)
            if USE_MAX:
                worst = tl.maximum(worst, tl.max((share != share).to(tl.int32), axis=0))
                out = tl.maximum(out, tl.max(share, axis=0))
            else:
                out += tl.sum(share, axis=0)
                used += some
        if USE_MAX:
            out = tl.where(worst > 0, float("nan"), out)
        else:
            out = tl.div_rn(out, tl.maximum(tl.sum(used, axis=0), 1.0) + tl.zeros([BLOCK_N], tl.float32))
        out = round_16_bits(out)
        inside = column < hi
        tl.store(score + tl.load(piece + 3) + offset, out, mask=inside)
        behind = tl.load(piece + 4) + offset
        tl.store(place + behind, column, mask=inside)
        if packed is not None:
            tl.store(packed + behind, out, mask=inside)


# ---------------------------------------------------------------------- host
def _tiles(rows: int, dim: int, dtype: torch.dtype, warps: int, unit: int) -> tuple[int, int, int]:
    """(query rows at once, depth of a product's step, steps); more than the warps' registers hold would spill."""
    single = dtype == torch.float32
    depth = power_of_2(dim, 16, 16 if single or unit == 1 else 128)
    most = 16 if single or unit == 1 else min(64, 8 * warps)
    return power_of_2(rows, 16, most), depth, max(1, ceil_div(dim, depth))


def attention_topk(
    query: Tensor,
    key: Tensor,
    keep: list[int],
    span: Tensor,
    group: Tensor | None,
    scale: float,
    mask: Tensor | None,
    query_position: Tensor | None,
    use_max: bool,
    num_index: int,
    num_score: int,
) -> Any:
    """See :func:`vidtok.kernels.reference.attention_topk.attention_topk`."""
    if key.dtype not in POINTER:
        return NotImplemented
    batch, heads, width, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    numbers = None if group is None else tuple(group.tolist())
    layout = spans.layout(tuple(span.flatten().tolist()), numbers, tuple(keep), batch, length)
    total = layout.offsets[-1]
    below_2_31(max(length, total) + 65536, "keys and a block")
    index = key.new_empty(sum(layout.budgets), dtype=torch.int64)
    score = key.new_empty(total, dtype=torch.float32)
    if total == 0:
        return index, score
    rows = heads // kv_heads * width
    shape = {"length": length, "q_heads": heads, "kv_heads": kv_heads, "dim": dim, "rows": width}
    knobs = choice("attention_topk", key, shape)
    # One warp's registers do not hold a tile.
    warps = max(2, knobs["num_warps"])
    launch = {"num_warps": warps, "num_stages": knobs["num_stages"], **LAUNCH}
    by_batch, by_head, by_row, _ = key.stride()
    unit = vector(key, dim, by_batch, by_head, by_row)
    block_m, depth, steps = _tiles(rows, dim, key.dtype, warps, unit)
    splits, tiles, all_rows = ceil_div(length, knobs["split"]), ceil_div(rows, block_m), batch * kv_heads * rows
    # Kept logits are written and read once, at most half as many bytes as the keys.
    kept = 8 * rows <= dim * key.element_size()
    plane = all_rows * splits
    partial = key.new_empty(3 * plane, dtype=torch.float32)
    logit = key.new_empty(all_rows * length, dtype=torch.float32) if kept else None
    whole = None if kept else key.new_empty(all_rows * 3, dtype=torch.float32)
    place = key.new_empty(total, dtype=torch.int32)
    packed = None if layout.ordered else torch.empty_like(score)
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    pieces = device_list(layout.pieces, key)
    strides = (by_batch // unit, by_head // unit, by_row // unit)
    sizes = (kv_heads, rows, width, length, dim // unit, splits, tiles, plane, *strides, scale)
    tile = {"BLOCK_D": depth, "STEPS": steps, "UNIT": unit}
    with on_device(key):
        if all_rows:
            split_sums[(batch * kv_heads * tiles * splits,)](
                query, key, seen, query_position, partial, logit, *sizes,
                SPLIT=knobs["split"], BLOCK_M=block_m, BLOCK_N=min(_KEYS, knobs["split"]), **tile, **launch,
            )  # fmt: skip
            if whole is not None:
                combine[(ceil_div(all_rows, 16),)](partial, whole, all_rows, plane, splits, BLOCK_M=16, **LAUNCH)
        if kept:
            # No product is taken here: any number of rows will do.
            block_m, columns = power_of_2(rows, 1, 16), min(_COLUMNS, 128 * warps)
            sizes = (*sizes[:6], ceil_div(rows, block_m), *sizes[7:])
        else:
            columns = _KEYS
        blocks = ceil_div(layout.longest, columns)
        scores[(span.shape[0] * blocks,)](
            query, key, seen, query_position, partial, whole, logit, pieces, score, packed, place, *sizes, blocks,
            USE_MAX=use_max, BLOCK_M=block_m, BLOCK_N=columns, **tile, **launch,
        )  # fmt: skip
    offsets = device_list(layout.offsets, key, torch.int32)
    budgets = layout.budgets[:1] if len(set(layout.budgets)) == 1 else layout.budgets
    select_into(index, score if packed is None else packed, budgets, offsets, len(layout.budgets), place)
    return index, score


def specimens() -> list[Specimen]:
    """Each kernel in each dtype, with one query row and with many."""
    found = []
    numbers = {**dict.fromkeys(_INTEGERS[:-1], "i32"), "scale": "fp32"}
    for dtype, pointer in POINTER.items():
        name = str(dtype).removeprefix("torch.")
        inputs = {"query": pointer, "key": pointer, "partial": "*fp32"}
        outputs = {"piece": "*i64", "score": "*fp32", "place": "*i32", "blocks": "i32"}
        for rows, warps, unit in ((7, 4, 0), (448, 4, 0), (448, 2, 0), (7, 4, 1), (448, 4, 1)):
            unit = unit or 16 // dtype.itemsize
            few = rows == 7
            block_m, depth, steps = _tiles(rows, 128, dtype, warps, unit)
            tile = {"BLOCK_D": depth, "STEPS": steps, "UNIT": unit}
            seen: dict[str, Any] = {"mask": None, "position": None} if few else {}
            extra = {} if few else {"mask": "*u8", "position": "*i64"}
            first = {**inputs, **numbers, **extra, **({"logit": "*fp32"} if few else {})}
            fixed: dict[str, Any] = {**seen, "SPLIT": 256, "BLOCK_M": block_m, "BLOCK_N": _KEYS, **tile}
            if not few:
                fixed["logit"] = None
            kind = f"of {rows} rows {name}, warps {warps}, unit {unit}"
            found.append(Specimen(f"attention_topk sums {kind}", split_sums, first, fixed, warps, 2))
            second = {**first, **outputs, **({} if few else {"whole": "*fp32", "packed": "*fp32"})}
            unused: dict[str, Any] = {"whole": None, "packed": None} if few else {"logit": None}
            block = {"BLOCK_M": 8, "BLOCK_N": 128 * warps} if few else {"BLOCK_M": block_m, "BLOCK_N": _KEYS}
            fixed = {**seen, **unused, "USE_MAX": not few, **block, **tile}
            found.append(Specimen(f"attention_topk scores {kind}", scores, second, fixed, warps, 2))
    signature = {"partial": "*fp32", "whole": "*fp32", "rows": "i32", "plane": "i32", "splits": "i32"}
    return [*found, Specimen("attention_topk combination", combine, signature, {"BLOCK_M": 16})]
