"""cluster_dpc_knn in Triton.

Launches: norms; one row per segment of a table (place, scale, where its distances lie); tiles of the Gram matrix,
which write squared distances as integers to a workspace; then per token density, score, rank among the segment's
scores and nearest centre. Segments beyond the workspace are swept: the same tiles are computed again in each pass
and nothing of them is kept. Which segments these are, the table says on the device, without a sync; their launches
are left out where the workspace holds any segments of so many tokens.

Everything compared is an integer (distances in units of q, densities in 2⁻²⁰) or an fp64 score of two of them, so
only DEPTH, which cuts the products, and the warps of the norms may change a bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE
from vidtok.kernels.reference._numerics import bounds
from vidtok.kernels.reference.cluster_dpc_knn import MAX_UNITS, STEPS
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    ceil_div,
    code_of,
    dot,
    power_of_2,
    report,
    rint,
)
from vidtok.kernels.triton.adjacent_similarity import _place, _vector

COUNTS = tl.constexpr(code_of("cluster_dpc_knn", "num_clusters"))
OFFSETS = tl.constexpr(code_of("cluster_dpc_knn", "cu_seqlens"))
UNITS = tl.constexpr(float(STEPS))
LARGEST = tl.constexpr(float(MAX_UNITS))
# Above every distance and every rank.
NONE = tl.constexpr(2**30)
NEVER = tl.constexpr(2**62)
# Adding and taking it away rounds an fp64 of at most 2⁵¹ half to even.
ROUND = tl.constexpr(6755399441055744.0)

# Numbers of a segment in the table: first token, tokens, place of its distances (−1: swept), first tile, centres,
# place of its centres.
FIELDS = tl.constexpr(6)
TILES = tl.constexpr(3)

# Bytes that a call may use for distances and numbers per token.
WORKSPACE = 64 << 20
# Bytes per token beside the distances.
PER_TOKEN = 32
# Rows of stored distances start at multiples of it.
ALIGN = tl.constexpr(16)
# The longest list of nearest neighbours that a sweep keeps in registers.
LONGEST_LIST = 64
# Up to so many neighbours, taking the smallest again and again beats cutting by bits.
FEW = tl.constexpr(16)
CHUNK = 1024


# Numbers are not specialised, so that a kernel serves every shape.
@triton.jit(do_not_specialize=["segments", "channels", "x_stride"])
def _norms(
    x, cu, norm, segment, segments, channels, x_stride,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """‖x‖² and the segment of each token; ``channels`` and ``x_stride`` count vectors of VECTOR elements, as below."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels * VECTOR, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = x + token * (x_stride.to(tl.int64) * VECTOR) + column
        value = tl.load(at, mask=column < channels * VECTOR, other=0.0).to(tl.float32)
        squares += value * value
    tl.store(norm + token, tl.sum(squares, axis=0))
    tl.store(segment + token, _place(cu, segments - 1, token, 1, 0, SEARCH).to(tl.int32))


@triton.jit
def _lengths(cu, s, segments, total):
    """First token and tokens of segments, inside the input whatever ``cu`` holds."""
    here = s < segments
    begin = tl.load(cu + s, mask=here, other=0).to(tl.int64)
    end = tl.load(cu + s + 1, mask=here, other=0).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    return begin, end - begin


@triton.jit
def _area(n):
    return n * ((n + ALIGN - 1) // ALIGN * ALIGN)


@triton.jit(do_not_specialize=["total", "segments", "count_step", "room", "channels", "num_center"])
def _segments(
    cu, norm, counts, starts, table, factor, unit, center, total, segments, count_step, room, channels, num_center,
    error, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of the table, the scale of a segment's distances, and the checks of its numbers."""
    s = tl.program_id(0).to(tl.int64)
    total = total.to(tl.int64)
    raw_begin = tl.load(cu + s).to(tl.int64)
    raw_end = tl.load(cu + s + 1).to(tl.int64)
    bad = (raw_begin < 0) | (raw_end < raw_begin) | (raw_end > total) | ((s == 0) & (raw_begin != 0))
    bad = bad | ((s == segments - 1) & (raw_end != total))
    zero = tl.zeros((), tl.int64)
    report(error, OFFSETS, raw_end, zero, total + 1, bad)
    begin, n = _lengths(cu, s, segments, total)
    wanted = tl.load(counts + s * count_step)
    report(error, COUNTS, wanted, zero, n + 1, (wanted < 0) | (wanted > n))
    # Where the distances of this segment lie, and its tiles, behind those of all before it.
    place = zero
    tiles = zero
    for first in range(0, s, CHUNK):
        r = first + tl.arange(0, CHUNK).to(tl.int64)
        _, other = _lengths(cu, r, segments, total)
        other = tl.where(r < s, other, 0)
        place += tl.sum(_area(other), axis=0)
        side = (other + TILE - 1) // TILE
        tiles += tl.sum(side * (side + 1) // 2, axis=0)
    stored = place + _area(n) <= room
    row = table + s * FIELDS
    tl.store(row, begin)
    tl.store(row + 1, n)
    tl.store(row + 2, tl.where(stored, place, -1))
    tl.store(row + TILES, tl.where(stored, tiles, NEVER))
    kept = tl.minimum(tl.maximum(wanted, 0), n)
    tl.store(row + 4, kept)
    to = tl.load(starts + s)
    tl.store(row + 5, to)
    # Centres that a bad count leaves without a token.
    for at in range(kept, tl.minimum(wanted, num_center - to)):
        tl.store(center + to + at, zero)
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, n, CHUNK):
        i = first + tl.arange(0, CHUNK)
        value = tl.load(norm + begin + i, mask=i < n, other=0.0)
        largest = tl.maximum(largest, tl.where(value < float("inf"), value, 0.0))
    # The power of two at or above it: one more in the exponent unless the fraction is 0.
    width = channels.to(tl.float64)
    bits = (tl.max(largest, axis=0).to(tl.float64) / width).to(tl.int64, bitcast=True)
    exponent = (bits >> 52) + tl.where((bits & 0xFFFFFFFFFFFFF) != 0, 1, 0)
    scale = tl.where(bits > 0, exponent << 52, 0).to(tl.float64, bitcast=True)
    inverse = tl.where(scale > 0.0, UNITS / (width * tl.where(scale > 0.0, scale, 1.0)), 0.0)
    tl.store(factor + s, inverse.to(tl.float32))
    tl.store(unit + s, scale / UNITS)


@triton.jit
def _distances(
    x, norm, rows, row_inside, columns, column_inside, factor, channels, stride,
    VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Squared distances of two lists of tokens in units, int32 ``[TILE, TILE]``; ``factor`` belongs to the rows."""
    products = tl.zeros((TILE, TILE), tl.float32)
    depth = tl.arange(0, DEPTH)
    a = x + rows.to(tl.int64)[:, None] * (stride * VECTOR) + depth[None, :]
    b = x + columns.to(tl.int64)[None, :] * (stride * VECTOR) + depth[:, None]
    for start in range(0, channels * VECTOR, DEPTH):
        left = start + depth < channels * VECTOR
        u = tl.load(a + start, mask=row_inside[:, None] & left[None, :], other=0.0)
        v = tl.load(b + start, mask=column_inside[None, :] & left[:, None], other=0.0)
        products = dot(u, v, products)
    of_rows = tl.load(norm + rows, mask=row_inside, other=0.0)
    of_columns = tl.load(norm + columns, mask=column_inside, other=0.0)
    raw = ((of_rows[:, None] + of_columns[None, :]) - 2.0 * products) * factor[:, None]
    finite = tl.abs(raw) < float("inf")
    raw = tl.where(raw > 0.0, raw, 0.0)
    units = tl.where(finite, rint(tl.where(raw < LARGEST, raw, LARGEST)), LARGEST)
    return tl.where(rows[:, None] == columns[None, :], 0, units.to(tl.int32))


@triton.jit(do_not_specialize=["segments", "channels", "x_stride"])
def _gram(
    x, norm, table, factor, distance, segments, channels, x_stride,
    VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One tile of the upper triangle of a stored segment's distances, and its mirror image."""
    program = tl.program_id(0).to(tl.int64)
    s = _place(table, segments - 1, program, FIELDS, TILES, SEARCH)
    begin = tl.load(table + s * FIELDS).to(tl.int32)
    n = tl.load(table + s * FIELDS + 1).to(tl.int32)
    place = tl.load(table + s * FIELDS + 2)
    local = (program - tl.load(table + s * FIELDS + TILES)).to(tl.int32)
    side = (n + TILE - 1) // TILE
    if (place >= 0) & (local >= 0) & (local < side * (side + 1) // 2):
        # Tiles in columns: column c begins at c(c + 1)/2.
        column = ((tl.sqrt(8.0 * local.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        column = tl.where(column * (column + 1) // 2 > local, column - 1, column)
        column = tl.where((column + 1) * (column + 2) // 2 <= local, column + 1, column)
        row = local - column * (column + 1) // 2
        i = row * TILE + tl.arange(0, TILE)
        j = column * TILE + tl.arange(0, TILE)
        scale = tl.zeros((TILE,), tl.float32) + tl.load(factor + s)
        units = _distances(
            x, norm, begin + i, i < n, begin + j, j < n, scale, channels, x_stride.to(tl.int64), VECTOR, TILE, DEPTH
        )
        # A stored segment holds less than 2³¹ distances.
        ld = (n + ALIGN - 1) // ALIGN * ALIGN
        to = distance + place
        inside = (i < n)[:, None] & (j < n)[None, :]
        tl.store(to + (i[:, None] * ld + j[None, :]), units, mask=inside)
        if row != column:
            tl.store(to + (j[:, None] * ld + i[None, :]), tl.trans(units), mask=(j < n)[:, None] & (i < n)[None, :])


@triton.jit
def _of_sum(total, k, unit):
    """Density from the sum of the k smallest distances, in multiples of 2⁻²⁰."""
    mean = total.to(tl.float64) * unit / k.to(tl.float64)
    return ((tl.exp(-mean) * UNITS + ROUND) - ROUND).to(tl.int32)


@triton.jit(do_not_specialize=["k"])
def _density(distance, table, segment, unit, density, largest, k, BLOCK: tl.constexpr):
    """Density of a token of a stored segment and its largest distance; the row stays in registers."""
    token = tl.program_id(0).to(tl.int64)
    s = tl.load(segment + token).to(tl.int64)
    n = tl.load(table + s * FIELDS + 1)
    place = tl.load(table + s * FIELDS + 2)
    i = token - tl.load(table + s * FIELDS)
    if (place >= 0) & (i >= 0) & (i < n):
        j = tl.arange(0, BLOCK)
        at = distance + place + i * ((n + ALIGN - 1) // ALIGN * ALIGN) + j
        units = tl.load(at, mask=j < n, other=NONE)
        k = tl.minimum(k.to(tl.int64), n).to(tl.int32)
        total = tl.zeros((), tl.int64)
        if k <= FEW:
            left = k
            last = k * 0 - 1
            while left > 0:
                last = tl.min(tl.where(units > last, units, NONE), axis=0)
                taken = tl.minimum(tl.sum((units == last).to(tl.int32), axis=0), left)
                total += taken.to(tl.int64) * last.to(tl.int64)
                left -= taken
        else:
            # The k-th smallest, bit by bit: the largest number with fewer than k distances below it.
            cut = k * 0
            for bit in tl.static_range(23):
                more = cut | (1 << (22 - bit))
                cut = tl.where(tl.sum((units < more).to(tl.int32), axis=0) < k, more, cut)
            below = units < cut
            total = tl.sum(tl.where(below, units, 0).to(tl.int64), axis=0)
            total += (k - tl.sum(below.to(tl.int32), axis=0)).to(tl.int64) * cut.to(tl.int64)
        tl.store(density + token, _of_sum(total, k, tl.load(unit + s)))
        tl.store(largest + token, tl.max(tl.where(j < n, units, 0), axis=0))


@triton.jit
def _score(nearest, furthest, own, unit):
    """ρ·δ as an integer of the same order; scores are at least 0."""
    units = tl.where(nearest == NONE, furthest, nearest)
    delta = tl.sqrt(units.to(tl.float64) * unit)
    return (own.to(tl.float64) / UNITS * delta).to(tl.int64, bitcast=True)


@triton.jit
def _scores(distance, table, segment, unit, density, largest, score, BLOCK: tl.constexpr):
    """Score of a token of a stored segment."""
    token = tl.program_id(0).to(tl.int64)
    s = tl.load(segment + token).to(tl.int64)
    begin = tl.load(table + s * FIELDS)
    n = tl.load(table + s * FIELDS + 1)
    place = tl.load(table + s * FIELDS + 2)
    i = token - begin
    if (place >= 0) & (i >= 0) & (i < n):
        j = tl.arange(0, BLOCK)
        units = tl.load(distance + place + i * ((n + ALIGN - 1) // ALIGN * ALIGN) + j, mask=j < n, other=NONE)
        others = tl.load(density + begin + j, mask=j < n, other=-1)
        own = tl.load(density + token)
        higher = (others > own) | ((others == own) & (j < i))
        nearest = tl.min(tl.where(higher, units, NONE), axis=0)
        furthest = nearest * 0
        if nearest == NONE:
            furthest = tl.max(tl.load(largest + begin + j, mask=j < n, other=0), axis=0)
        tl.store(score + token, _score(nearest, furthest, own, tl.load(unit + s)))


@triton.jit
def _tokens(table, segment, total, TILE: tl.constexpr):
    """TILE tokens in a row: (tokens, which exist, segment, first token of the segment, the one behind its last)."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    s = tl.load(segment + token, mask=token < total, other=0).to(tl.int64)
    begin = tl.load(table + s * FIELDS).to(tl.int32)
    end = begin + tl.load(table + s * FIELDS + 1).to(tl.int32)
    here = (token < total) & (token >= begin) & (token < end)
    return token, here, s, begin, end


@triton.jit
def _extent(here, begin, end):
    """The places that rows have to do with, from the first to behind the last."""
    return tl.min(tl.where(here, begin, NONE), axis=0), tl.max(tl.where(here, end, 0), axis=0)


@triton.jit(do_not_specialize=["total", "k", "channels", "x_stride"])
def _swept_density(
    x, norm, table, segment, factor, unit, density, largest, total, k, channels, x_stride,
    VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """``_density`` of TILE tokens of swept segments. LIST 0: any k, with one sweep for each bit of a distance."""
    token, here, s, begin, end = _tokens(table, segment, total, TILE)
    here = here & (tl.load(table + s * FIELDS + 2) < 0)
    low, high = _extent(here, begin, end)
    scale = tl.load(factor + s)
    stride = x_stride.to(tl.int64)
    kept = tl.minimum(k.to(tl.int64), (end - begin).to(tl.int64)).to(tl.int32)
    furthest = tl.zeros((TILE,), tl.int32)
    if LIST > 0:
        slot = tl.arange(0, LIST)
        # Places behind the k-th hold −1 and are never the largest.
        nearest = tl.where(slot[None, :] < kept[:, None], NONE, -1)
        for first in range(low, high, TILE):
            other = first + tl.arange(0, TILE)
            units = _distances(x, norm, token, here, other, other < high, scale, channels, stride, VECTOR, TILE, DEPTH)
            same = (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None]) & here[:, None]
            furthest = tl.maximum(furthest, tl.max(tl.where(same, units, 0), axis=1))
            units = tl.where(same, units, NONE)
            least = tl.min(units, axis=1)
            worst = tl.max(nearest, axis=1)
            while tl.max((least < worst).to(tl.int32), axis=0) > 0:
                # The smallest of the tile takes the place of the largest of the list.
                better = least < worst
                place = tl.argmax(nearest, axis=1)
                nearest = tl.where(better[:, None] & (slot[None, :] == place[:, None]), least[:, None], nearest)
                gone = tl.argmin(units, axis=1)
                used = better[:, None] & (tl.arange(0, TILE)[None, :] == gone[:, None])
                units = tl.where(used, NONE, units)
                least = tl.min(units, axis=1)
                worst = tl.max(nearest, axis=1)
        sums = tl.sum(tl.where(nearest < 0, 0, nearest).to(tl.int64), axis=1)
    else:
        cut = tl.zeros((TILE,), tl.int32)
        sums = tl.zeros((TILE,), tl.int64)
        for step in range(24):
            # The last sweep adds what lies below the cut.
            more = tl.where(step < 23, cut | (1 << tl.maximum(22 - step, 0)), cut)
            below = tl.zeros((TILE,), tl.int32)
            sums = tl.zeros((TILE,), tl.int64)
            for first in range(low, high, TILE):
                other = first + tl.arange(0, TILE)
                units = _distances(
                    x, norm, token, here, other, other < high, scale, channels, stride, VECTOR, TILE, DEPTH
                )
                same = (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None]) & here[:, None]
                furthest = tl.maximum(furthest, tl.max(tl.where(same, units, 0), axis=1))
                under = same & (units < more[:, None])
                below += tl.sum(under.to(tl.int32), axis=1)
                sums += tl.sum(tl.where(under, units, 0).to(tl.int64), axis=1)
            if step < 23:
                cut = tl.where(below < kept, more, cut)
            else:
                sums += (kept - below).to(tl.int64) * cut.to(tl.int64)
    tl.store(density + token, _of_sum(sums, kept, tl.load(unit + s)), mask=here)
    tl.store(largest + token, furthest, mask=here)


@triton.jit(do_not_specialize=["total", "channels", "x_stride"])
def _swept_scores(
    x, norm, table, segment, factor, unit, density, largest, score, total, channels, x_stride,
    VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``_scores`` of TILE tokens of swept segments."""
    token, here, s, begin, end = _tokens(table, segment, total, TILE)
    here = here & (tl.load(table + s * FIELDS + 2) < 0)
    low, high = _extent(here, begin, end)
    scale = tl.load(factor + s)
    own = tl.load(density + tl.minimum(token, total - 1))
    nearest = tl.zeros((TILE,), tl.int32) + NONE
    furthest = tl.zeros((TILE,), tl.int32)
    for first in range(low, high, TILE):
        other = first + tl.arange(0, TILE)
        units = _distances(
            x, norm, token, here, other, other < high, scale, channels, x_stride.to(tl.int64), VECTOR, TILE, DEPTH
        )
        same = (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None])
        others = tl.load(density + other, mask=other < high, other=-1)[None, :]
        higher = (others > own[:, None]) | ((others == own[:, None]) & (other[None, :] < token[:, None]))
        nearest = tl.minimum(nearest, tl.min(tl.where(same & higher, units, NONE), axis=1))
    # A peak takes the largest distance of its segment.
    if tl.max(tl.where(here & (nearest == NONE), 1, 0), axis=0) > 0:
        for first in range(low, high, TILE):
            other = first + tl.arange(0, TILE)
            longest = tl.load(largest + other, mask=other < high, other=0)
            same = (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None])
            furthest = tl.maximum(furthest, tl.max(tl.where(same, longest[None, :], 0), axis=1))
    tl.store(score + token, _score(nearest, furthest, own, tl.load(unit + s)), mask=here)


@triton.jit(do_not_specialize=["total", "num_center"])
def _rank(score, table, segment, rank, center, total, num_center, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Place of each token among its segment's scores, the highest and then the lowest index first; the centres."""
    token, here, s, begin, end = _tokens(table, segment, total, ROWS)
    low, high = _extent(here, begin, end)
    own = tl.load(score + token, mask=here, other=0)[:, None]
    above = tl.zeros((ROWS,), tl.int32)
    for first in range(low, high, BLOCK):
        other = first + tl.arange(0, BLOCK)
        others = tl.load(score + other, mask=other < high, other=-1)[None, :]
        same = (other[None, :] >= begin[:, None]) & (other[None, :] < end[:, None])
        before = (others > own) | ((others == own) & (other[None, :] < token[:, None]))
        above += tl.sum((same & before).to(tl.int32), axis=1)
    tl.store(rank + token, above, mask=here)
    to = tl.load(table + s * FIELDS + 5) + above
    chosen = here & (above < tl.load(table + s * FIELDS + 4)) & (to < num_center)
    tl.store(center + to, token.to(tl.int64), mask=chosen)


@triton.jit
def _assign(distance, table, segment, rank, center, assignment, BLOCK: tl.constexpr):
    """Rank of the centre of a token: its own, or that of the nearest, the lowest index first."""
    token = tl.program_id(0).to(tl.int64)
    s = tl.load(segment + token).to(tl.int64)
    row = table + s * FIELDS
    begin = tl.load(row)
    n = tl.load(row + 1)
    place = tl.load(row + 2)
    count = tl.load(row + 4)
    i = token - begin
    if (i < 0) | (i >= n):
        tl.store(assignment + token, i * 0)
    elif place >= 0:
        own = tl.load(rank + token).to(tl.int64)
        at = distance + place + i * ((n + ALIGN - 1) // ALIGN * ALIGN)
        centers = center + tl.load(row + 5)
        best = i * 0 + NEVER
        if own >= count:
            for first in range(0, count, BLOCK):
                c = first + tl.arange(0, BLOCK)
                j = tl.load(centers + c, mask=c < count, other=0) - begin
                known = (c < count) & (j >= 0) & (j < n)
                units = tl.load(at + j, mask=known, other=NONE).to(tl.int64)
                best = tl.minimum(best, tl.min(tl.where(known, (units << 32) | j, NEVER), axis=0))
            nearest = best & 0xFFFFFFFF
            own = tl.load(rank + begin + nearest, mask=nearest < n, other=0).to(tl.int64)
        tl.store(assignment + token, tl.where(count > 0, own, -1))


@triton.jit(do_not_specialize=["total", "channels", "x_stride"])
def _swept_assign(
    x, norm, table, segment, factor, rank, center, assignment, total, channels, x_stride,
    VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``_assign`` of TILE tokens of swept segments."""
    token, here, s, _, _ = _tokens(table, segment, total, TILE)
    here = here & (tl.load(table + s * FIELDS + 2) < 0)
    count = tl.load(table + s * FIELDS + 4).to(tl.int32)
    to = tl.load(table + s * FIELDS + 5).to(tl.int32)
    low, high = _extent(here, to, to + count)
    scale = tl.load(factor + s)
    best = tl.zeros((TILE,), tl.int64) + NEVER
    for first in range(low, high, TILE):
        c = first + tl.arange(0, TILE)
        other = tl.load(center + c, mask=c < high, other=0).to(tl.int32)
        units = _distances(
            x, norm, token, here, other, c < high, scale, channels, x_stride.to(tl.int64), VECTOR, TILE, DEPTH
        )
        same = (c[None, :] >= to[:, None]) & (c[None, :] < (to + count)[:, None])
        key = (units.to(tl.int64) << 32) | other.to(tl.int64)[None, :]
        best = tl.minimum(best, tl.min(tl.where(same, key, NEVER), axis=1))
    own = tl.load(rank + token, mask=here, other=0)
    nearest = best & 0xFFFFFFFF
    theirs = tl.load(rank + nearest, mask=here & (best < NEVER), other=0)
    own = tl.where(own < count, own, theirs)
    tl.store(assignment + token, tl.where(count > 0, own, -1).to(tl.int64), mask=here)


def _areas(cu: list[int]) -> int:
    """Distances kept of segments whose offsets the host knows."""
    align = ALIGN.value
    return sum((b - a) * ceil_div(b - a, align) * align for a, b in zip(cu, cu[1:]))


def cluster_dpc_knn(x: Tensor, num_clusters: Tensor, k: int, cu_seqlens: Tensor | None, num_center: int) -> Any:
    """See :func:`vidtok.kernels.reference.cluster_dpc_knn.cluster_dpc_knn`."""
    if x.dtype not in DTYPE_CODE:
        return NotImplemented
    n, c = x.shape
    below_2_31(2 * n, "halves of tokens")
    if x.stride(1) != 1:
        x = x.contiguous()
    # Offsets on the CPU are known; those on a GPU stay there.
    known = None
    if cu_seqlens is None:
        known = [0, n]
    elif not cu_seqlens.is_cuda:
        known = [0, *(b for _, b in bounds(cu_seqlens, n))]
    segments = len(known) - 1 if known is not None else cu_seqlens.shape[0] - 1  # type: ignore[union-attr]
    counts = num_clusters.tolist()
    if len(counts) not in (1, segments):
        raise ValueError(f"expected num_clusters as one number or {segments}, got {len(counts)}")
    each = counts if len(counts) == segments else counts * segments
    starts = [0]
    for count in each:
        starts.append(starts[-1] + max(count, 0))
    num_center = starts[-1]
    if known is not None:
        for count, a, b in zip(each, known, known[1:]):
            if not 0 <= count <= b - a:
                raise ValueError(f"expected num_clusters between 0 and the segment's {b - a} tokens, got {count}")
    assignment = x.new_empty(n, dtype=torch.int64)
    center = x.new_empty(num_center, dtype=torch.int64)
    error = _common.error_words(x)
    if n == 0 or segments == 0:
        return assignment, center.zero_()
    cu = _common.device_list(known, x, torch.int32) if known is not None else cu_seqlens
    longest = n if known is None else max(b - a for a, b in zip(known, known[1:]))
    knobs = _common.choice("cluster_dpc_knn", x, {"segments": segments, "longest": longest, "channels": c})
    vector, tile = _vector(x), knobs["tile"]
    # c and the stride of x in vectors, and the blocks of every kernel that multiplies tokens.
    sizes = (c // vector, x.stride(0) // vector)
    blocks = {"VECTOR": vector, "TILE": tile, "DEPTH": knobs["depth"]}
    blocks |= {"num_warps": knobs["num_warps"], "num_stages": knobs["num_stages"], **LAUNCH}

    room = max((WORKSPACE - PER_TOKEN * n) // 4, 0)
    area = _areas([0, n] if known is None else known)
    stored = min(room, area)
    # A segment that does not fit is swept: known where the lengths are, else whenever it could be so.
    swept = area > room
    distance = x.new_empty(stored, dtype=torch.int32)
    norm, factor = x.new_empty(n, dtype=torch.float32), x.new_empty(segments, dtype=torch.float32)
    unit = x.new_empty(segments, dtype=torch.float64)
    # Rows of whole vectors, since Triton compiles anew for pointers that are not aligned to 16 bytes.
    segment, density, largest, rank = x.new_empty(4, ceil_div(n, 4) * 4, dtype=torch.int32).unbind()
    score = x.new_empty(n, dtype=torch.int64)
    table = x.new_empty(segments * FIELDS.value, dtype=torch.int64)
    search = segments.bit_length()
    # A row of distances that are kept: its segment's square fits into the workspace.
    row = power_of_2(min(longest, int(room**0.5)), 16)
    row_warps = min(max(row // 512, 1), 8)
    # Tiles of the upper triangles of segments with at most ``stored`` distances and n tokens in all.
    sides = n // tile + segments
    tiles = min(sides * (sides + 1) // 2, (stored // (tile * tile) + 3 * (n // tile) + 2 * segments) // 2 + 3)
    with _common.on_device(x):
        _norms[(n,)](
            x, cu, norm, segment, segments, *sizes, VECTOR=vector, BLOCK=power_of_2(c, 16, CHUNK), SEARCH=search,
            num_warps=knobs["num_warps"], **LAUNCH,
        )  # fmt: skip
        _segments[(segments,)](
            cu, norm, _common.device_list(counts, x), _common.device_list(starts, x), table, factor, unit, center,
            n, segments, 0 if len(counts) == 1 else 1, stored, c, num_center, error, TILE=tile, CHUNK=CHUNK,
            num_warps=4, **LAUNCH,
        )  # fmt: skip
        rows = {"BLOCK": row, "num_warps": row_warps, **LAUNCH}
        if stored:
            _gram[(tiles,)](x, norm, table, factor, distance, segments, *sizes, SEARCH=search, **blocks)
            _density[(n,)](distance, table, segment, unit, density, largest, k, **rows)
        # Sweeps hold more beside a tile than the Gram matrix does, and fp32 products more than those of tensor cores.
        sweep = {**blocks, "TILE": min(tile, 64)}
        if x.dtype == torch.float32:
            sweep |= {"TILE": 32, "DEPTH": 32, "num_warps": 8}  # any other spills registers
        tokens, sweeps = (x, norm, table, segment, factor), (ceil_div(n, sweep["TILE"]),)
        if swept:
            kept = power_of_2(min(k, longest), 16)
            kept = kept if kept <= LONGEST_LIST else 0
            _swept_density[sweeps](*tokens, unit, density, largest, n, k, *sizes, LIST=kept, **sweep)
        if stored:
            _scores[(n,)](distance, table, segment, unit, density, largest, score, **rows)
        if swept:
            _swept_scores[sweeps](*tokens, unit, density, largest, score, n, *sizes, **sweep)
        _rank[(ceil_div(n, 16),)](
            score, table, segment, rank, center, n, num_center, ROWS=16, BLOCK=128, num_warps=4, **LAUNCH
        )
        _assign[(n,)](distance, table, segment, rank, center, assignment, BLOCK=128, num_warps=1, **LAUNCH)
        if swept:
            _swept_assign[sweeps](*tokens, rank, center, assignment, n, *sizes, **sweep)
    _common.check(x)
    return assignment, center


def specimens() -> list[Specimen]:
    """Representative compilations."""
    out = []
    numbers = {"norm": "*fp32", "table": "*i64", "segment": "*i32", "factor": "*fp32", "unit": "*fp64"}
    found = {"density": "*i32", "largest": "*i32", "score": "*i64"}
    sizes = {"channels": "i32", "x_stride": "i32"}
    for dtype, pointer in POINTER.items():
        name, shape = pointer[1:], {"VECTOR": 16 // dtype.itemsize, "TILE": 64, "DEPTH": 32}
        signature = {"x": pointer, "cu": "*i32", "norm": "*fp32", "segment": "*i32", "segments": "i32", **sizes}
        out.append(
            Specimen(f"norms {name}", _norms, signature, {"VECTOR": shape["VECTOR"], "BLOCK": 1024, "SEARCH": 5})
        )
        signature = {"x": pointer, "norm": "*fp32", "table": "*i64", "factor": "*fp32", "distance": "*i32"}
        signature |= {"segments": "i32", **sizes}
        out.append(Specimen(f"gram {name}", _gram, signature, {**shape, "SEARCH": 5}, 8, 2))
        shape["TILE"] = 32 if dtype == torch.float32 else 64
        tokens = {"x": pointer, **numbers}
        kept = {"density": "*i32", "largest": "*i32", "total": "i32", "k": "i32", **sizes}
        for length in (16, 0):
            signature = {**tokens, **kept}
            listed = {**shape, "LIST": length}
            out.append(Specimen(f"swept density, list of {length} {name}", _swept_density, signature, listed, 8, 2))
        signature = {**tokens, **found, "total": "i32", **sizes}
        out.append(Specimen(f"swept scores {name}", _swept_scores, signature, shape, 8, 2))
        signature = {k: v for k, v in tokens.items() if k != "unit"}
        signature |= {"rank": "*i32", "center": "*i64", "assignment": "*i64", "total": "i32", **sizes}
        out.append(Specimen(f"swept assign {name}", _swept_assign, signature, shape, 8, 2))
    signature = {"cu": "*i32", "norm": "*fp32", "counts": "*i64", "starts": "*i64", "table": "*i64"}
    signature |= {"factor": "*fp32", "unit": "*fp64", "center": "*i64", "total": "i32", "segments": "i32"}
    signature |= {"count_step": "i32", "room": "i32", "channels": "i32", "num_center": "i32", "error": "*i32"}
    out.append(Specimen("segments", _segments, signature, {"TILE": 64, "CHUNK": CHUNK}))
    stored = {"distance": "*i32", "table": "*i64", "segment": "*i32"}
    signature = {**stored, "unit": "*fp64", "density": "*i32", "largest": "*i32", "k": "i32"}
    out.append(Specimen("density", _density, signature, {"BLOCK": 4096}, 8))
    signature = {**stored, "unit": "*fp64", **found}
    out.append(Specimen("scores", _scores, signature, {"BLOCK": 4096}, 8))
    signature = {"score": "*i64", "table": "*i64", "segment": "*i32", "rank": "*i32", "center": "*i64"}
    signature |= {"total": "i32", "num_center": "i32"}
    out.append(Specimen("rank", _rank, signature, {"ROWS": 16, "BLOCK": 128}))
    signature = {**stored, "rank": "*i32", "center": "*i64", "assignment": "*i64"}
    out.append(Specimen("assign", _assign, signature, {"BLOCK": 128}, 1))
    return out
