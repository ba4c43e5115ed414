"""contour_select in Triton, in fp64 as the reference: distances rounded to 16 bits decide.

Launches: projection of 16 frames by 16 columns; one program per sequence for weights, mean, covariance, its Cholesky
factor, the factor's inverse and the distances; the contour (lower median by counting); the choice. The basis is made
on the CPU and kept on the device. Beyond LARGEST_RANK the middle step goes through torch, matrix by matrix and
without a sync, since no block holds two such matrices. Lengths of the sequences decide ranks, hence bases: offsets
on a GPU are read once, which waits for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok._constant import held
from vidtok.kernels.native import DTYPE_CODE
from vidtok.kernels.reference import contour_select as reference
from vidtok.kernels.reference._numerics import bounds, round_bits
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import LAUNCH, Specimen, below_2_31, ceil_div, power_of_2
from vidtok.kernels.triton.adjacent_similarity import _vector

STRATIFIED, CONTOUR, FURTHEST = range(len(reference.RULES))
TEMPERATURE = tl.constexpr(reference.TEMPERATURE)
SHRINKAGE = tl.constexpr(reference.SHRINKAGE)
LEAST_SPREAD = tl.constexpr(reference.LEAST_SPREAD)

# Frames and columns of one program of the projection; the smallest tile of an fp64 product.
SIDE = 16
# The largest matrix that one block factors in registers.
LARGEST_RANK = 64
# The most frames among which ``contour+fps`` chooses here; it holds one number of each in registers.
MOST_FRAMES = 1 << 14

# Numbers of a sequence in the table: first token, frames, rank, place of its basis, frames to choose, place of its
# choice, first number of its weights' query or -1.
FIELDS = tl.constexpr(7)
LAST_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _inverse_norm(squared):
    inverse = tl.where(squared == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(squared == 0.0, 1.0, squared)))
    return tl.where(squared < float("inf"), inverse, float("nan"))


# Numbers are not specialised, so that a kernel serves every shape.
@triton.jit(do_not_specialize=["channels", "x_stride", "columns"])
def _project(
    x, query, basis, table, tiles, z, logit, channels, x_stride, columns,
    VECTOR: tl.constexpr, QUERY: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SIDE frames by SIDE columns of x·basis, zeros for frames that are not finite; their logits, NaN for those."""
    tile = tiles + tl.program_id(0) * 2
    s = table + tl.load(tile) * FIELDS
    begin = tl.load(s)
    frames = tl.load(s + 1)
    rank = tl.load(s + 2)
    place = tl.load(s + 3)
    t = tl.load(tile + 1) + tl.arange(0, SIDE)
    here = t < frames
    r = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    width = channels * VECTOR
    stride = x_stride.to(tl.int64) * VECTOR
    total = tl.zeros((SIDE, SIDE), tl.float64)
    squares = tl.zeros((SIDE, BLOCK), tl.float64)
    if QUERY:
        of_query = query + tl.load(s + 6)
        products = tl.zeros((SIDE, BLOCK), tl.float64)
        query_squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < width
        at = x + (begin + t)[:, None] * stride + c[None, :]
        value = tl.load(at, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float64)
        squares += value * value
        if QUERY:
            q = tl.load(of_query + c, mask=inside, other=0.0).to(tl.float64)
            products += value * q[None, :]
            query_squares += q * q
        at = basis + place + c.to(tl.int64)[:, None] * columns + r[None, :]
        b = tl.load(at, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        total = tl.dot(value, b, total, input_precision="ieee", out_dtype=tl.float64)
    norm = tl.sum(squares, axis=1)
    finite = norm < float("inf")
    to = z + (begin + t)[:, None] * columns + r[None, :]
    tl.store(to, tl.where(finite[:, None], total, 0.0), mask=here[:, None])
    if tl.program_id(1) == 0:
        weight = norm * 0.0
        if QUERY:
            scale = _inverse_norm(tl.sum(query_squares, axis=0))
            weight = tl.sum(products, axis=1) * _inverse_norm(norm) * scale / TEMPERATURE
        tl.store(logit + begin + t, tl.where(finite, weight, float("nan")), mask=here)


@triton.jit
def _weights(logit, t, frames, largest, sum_of):
    """Weights of frames, and which frames there are that are finite."""
    value = tl.load(logit + t, mask=t < frames, other=float("nan"))
    finite = value == value
    weight = tl.exp(tl.where(finite, value - largest, 0.0))
    return tl.where(finite, weight / sum_of, 0.0), finite


@triton.jit
def _round_16_bits(x):
    """Round an fp64 of at least 0 to 16 significant bits, half to even; NaN and infinity stay."""
    bits = x.to(tl.int64, bitcast=True)
    rounded = ((bits + 68719476735 + ((bits >> 37) & 1)) & -137438953472).to(tl.float64, bitcast=True)
    return tl.where(x < float("inf"), rounded, x)


@triton.jit
def _measure(
    z, logit, table, sequences, distance, out, R: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Distances of the frames of one sequence."""
    s = table + tl.load(sequences + tl.program_id(0)) * FIELDS
    begin = tl.load(s)
    frames = tl.load(s + 1)
    rank = tl.load(s + 2)
    logit += begin
    z += begin * R
    r = tl.arange(0, R)
    block = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float64) - float("inf")
    for start in range(0, frames, BLOCK):
        value = tl.load(logit + start + block, mask=start + block < frames, other=float("nan"))
        largest = tl.maximum(largest, tl.where(value == value, value, float("-inf")))
    highest = tl.max(largest, axis=0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, frames, BLOCK):
        weight, _ = _weights(logit, start + block, frames, highest, 1.0)
        sums += weight
    sum_of = tl.sum(sums, axis=0)
    sum_of = tl.where(sum_of > 0.0, sum_of, 1.0)
    means = tl.zeros((R,), tl.float64)
    energies = tl.zeros((R,), tl.float64)
    for start in range(0, frames, BLOCK):
        t = start + block
        weight, _ = _weights(logit, t, frames, highest, sum_of)
        value = tl.load(z + t.to(tl.int64)[:, None] * R + r[None, :], mask=(t < frames)[:, None], other=0.0)
        means += tl.sum(value * weight[:, None], axis=0)
        energies += tl.sum(value * value * weight[:, None], axis=0)
    covariance = tl.zeros((R, R), tl.float64)
    for start in range(0, frames, BLOCK):
        t = start + block
        weight, _ = _weights(logit, t, frames, highest, sum_of)
        value = tl.load(z + t.to(tl.int64)[:, None] * R + r[None, :], mask=(t < frames)[:, None], other=0.0)
        value = tl.where((t < frames)[:, None], value - means[None, :], 0.0)
        weighted = tl.trans(value * weight[:, None])
        covariance = tl.dot(weighted, value, covariance, input_precision="ieee", out_dtype=tl.float64)
    diagonal = r[:, None] == r[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, covariance, 0.0), axis=1), axis=0)
    # Constants stand behind tensors: the interpreter of Triton 3.7 takes a constant in front for the whole product.
    spread = trace > tl.sum(energies, axis=0) * LEAST_SPREAD
    known = tl.where(spread, rank, 0)
    known = (r[:, None] < known) & (r[None, :] < known)
    one = tl.where(diagonal, 1.0, 0.0).to(tl.float64)
    # Columns beyond the rank, and all where the frames are equal, are those of the identity.
    left = covariance * (1.0 - SHRINKAGE) + one * (trace * SHRINKAGE / tl.maximum(rank, 1).to(tl.float64))
    left = tl.where(known, left, one)
    inverse = one
    # Gaussian elimination of [Σ | 1]: the rows become L's transpose and the inverse of L.
    for j in range(rank):
        pivot = tl.sqrt(tl.sum(tl.sum(tl.where(diagonal & (r[:, None] == j), left, 0.0), axis=1), axis=0))
        down = tl.sum(tl.where(r[None, :] == j, left, 0.0), axis=1) / pivot
        across = tl.sum(tl.where(r[:, None] == j, left, 0.0), axis=0) / pivot
        row = tl.sum(tl.where(r[:, None] == j, inverse, 0.0), axis=0) / pivot
        below = r[:, None] > j
        left = tl.where(below, left - down[:, None] * across[None, :], left)
        inverse = tl.where(below, inverse - down[:, None] * row[None, :], inverse)
        inverse = tl.where(r[:, None] == j, row[None, :], inverse)
    columns = tl.trans(inverse)
    for start in range(0, frames, BLOCK):
        t = start + block
        value = tl.load(z + t.to(tl.int64)[:, None] * R + r[None, :], mask=(t < frames)[:, None], other=0.0)
        y = tl.dot(value - means[None, :], columns, input_precision="ieee", out_dtype=tl.float64)
        squared = tl.sum(y * y, axis=1) * tl.where(spread, 1.0, 0.0)
        _, finite = _weights(logit, t, frames, highest, sum_of)
        rounded = tl.where(finite, _round_16_bits(squared), float("nan"))
        tl.store(distance + begin + t, rounded, mask=t < frames)
        tl.store(out + begin + t, rounded.to(tl.float32), mask=t < frames)


@triton.jit
def _key(value):
    """An fp64 of at least 0 as int64 of the same order, NaN last."""
    return tl.where(value == value, value.to(tl.int64, bitcast=True), LAST_KEY)


@triton.jit
def _contours(distance, table, tiles, contour, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The lower median of a sequence's distances, written by the program that holds it; 0 without distances."""
    tile = tiles + tl.program_id(0) * 2
    s = tl.load(tile)
    begin = tl.load(table + s * FIELDS)
    frames = tl.load(table + s * FIELDS + 1)
    t = (tl.load(tile + 1) + tl.arange(0, SIDE)).to(tl.int32)
    value = tl.load(distance + begin + t, mask=t < frames, other=float("nan"))
    own = _key(value)
    known = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((SIDE,), tl.int32)
    for start in range(0, frames.to(tl.int32), BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _key(tl.load(distance + begin + i, mask=i < frames, other=float("nan")))
        known += (key != LAST_KEY).to(tl.int32)
        lower = (key[None, :] < own[:, None]) | ((key[None, :] == own[:, None]) & (i[None, :] < t[:, None]))
        before += tl.sum(lower.to(tl.int32), axis=1)
    count = tl.sum(known, axis=0)
    middle = (before == (count - 1) // 2) & (own != LAST_KEY)
    tl.store(contour + s + t * 0, value, mask=middle)
    if (count == 0) & (tl.load(tile + 1) == 0):
        tl.store(contour + s, 0.0)


@triton.jit
def _nearness(distance, t, frames, contour):
    """Distance from the contour as a key; frames that do not exist come last."""
    value = tl.load(distance + t, mask=t < frames, other=float("nan"))
    return _key(tl.abs(value - contour))


@triton.jit
def _stratified(distance, table, parts, contour, index, BLOCK: tl.constexpr):
    """The frame of one part that is nearest the contour."""
    part = parts + tl.program_id(0) * 3
    s = tl.load(part)
    first = tl.load(part + 1)
    end = tl.load(part + 2)
    begin = tl.load(table + s * FIELDS)
    at = tl.load(contour + s)
    best = tl.zeros((), tl.int64) + LAST_KEY
    place = first
    for start in range(first, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        key = _nearness(distance + begin, t, end, at)
        least = tl.min(key, axis=0)
        if least < best:
            best = least
            place = tl.min(tl.where(key == least, t, end), axis=0)
    tl.store(index + tl.program_id(0), begin + place)


@triton.jit
def _order(distance, table, tiles, contour, order, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Place of each frame by nearness to the contour, then index."""
    tile = tiles + tl.program_id(0) * 2
    s = tl.load(tile)
    begin = tl.load(table + s * FIELDS)
    frames = tl.load(table + s * FIELDS + 1)
    at = tl.load(contour + s)
    t = (tl.load(tile + 1) + tl.arange(0, SIDE)).to(tl.int32)
    own = _nearness(distance + begin, t, frames, at)
    before = tl.zeros((SIDE,), tl.int32)
    for start in range(0, frames.to(tl.int32), BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _nearness(distance + begin, i, frames, at)
        nearer = (key[None, :] < own[:, None]) | ((key[None, :] == own[:, None]) & (i[None, :] < t[:, None]))
        before += tl.sum((nearer & (i < frames)[None, :]).to(tl.int32), axis=1)
    tl.store(order + begin + t, before, mask=t < frames)


@triton.jit
def _nearest(order, table, index, BLOCK: tl.constexpr):
    """The ``num`` frames nearest the contour, ascending."""
    s = table + tl.program_id(0) * FIELDS
    begin = tl.load(s)
    frames = tl.load(s + 1)
    num = tl.load(s + 4)
    to = tl.load(s + 5)
    for start in range(0, frames, BLOCK):
        t = start + tl.arange(0, BLOCK)
        chosen = (t < frames) & (tl.load(order + begin + t, mask=t < frames, other=0) < num)
        place = tl.cumsum(chosen.to(tl.int32), axis=0)
        tl.store(index + to + place - 1, begin + t, mask=chosen)
        to += tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _furthest(order, table, index, BLOCK: tl.constexpr):
    """Of the 2·num frames nearest the contour the nearest, then again and again the one furthest from the chosen."""
    s = table + tl.program_id(0) * FIELDS
    begin = tl.load(s)
    frames = tl.load(s + 1).to(tl.int32)
    num = tl.load(s + 4).to(tl.int32)
    to = tl.load(s + 5)
    if num > 0:
        t = tl.arange(0, BLOCK)
        place = tl.load(order + begin + t, mask=t < frames, other=2147483647)
        last = tl.sum(tl.where(place == 0, t, 0), axis=0)
        # −1: not to be chosen (any more); −2: chosen.
        gap = tl.where((place < 2 * num) & (t < frames), 2147483647, -1)
        gap = tl.where(t == last, -2, gap)
        for _ in range(1, num):
            gap = tl.where(gap >= 0, tl.minimum(gap, tl.abs(t - last)), gap)
            widest = tl.max(gap, axis=0)
            last = tl.min(tl.where(gap == widest, t, BLOCK), axis=0)
            gap = tl.where(t == last, -2, gap)
        chosen = gap == -2
        tl.store(index + to + tl.cumsum(chosen.to(tl.int32), axis=0) - 1, begin + t, mask=chosen)


def _measured_by_torch(z: Tensor, logit: Tensor, rank: int) -> Tensor:
    """``_measure`` of one sequence, fp64 and rounded."""
    finite = ~torch.isnan(logit)
    highest = torch.where(finite, logit, -torch.inf).amax()
    weight = torch.where(finite, torch.exp(logit - highest), 0.0)
    total = weight.sum()
    weight = weight / torch.where(total > 0, total, 1.0)
    centred = z - weight @ z
    covariance = (centred * weight[:, None]).T @ centred
    trace = covariance.diagonal().sum()
    spread = trace > reference.LEAST_SPREAD * (weight @ z.square().sum(1))
    shrunk = (1 - reference.SHRINKAGE) * covariance
    shrunk.diagonal().add_(reference.SHRINKAGE * trace / rank)
    factor = torch.linalg.cholesky_ex(torch.where(spread, shrunk, torch.eye(rank, dtype=z.dtype, device=z.device))).L
    squared = torch.linalg.solve_triangular(factor, centred.T, upper=False).square().sum(0)
    return torch.where(finite, round_bits(torch.where(spread, squared, 0.0)), torch.nan)


@lru_cache(maxsize=32)
def _bases(channels: int, ranks: tuple[int, ...], columns: int, seed: int, device: torch.device) -> Tensor:
    """The bases of some ranks one after the other, ``[ranks, C, columns]`` fp64."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("expected a call with the same lengths before the capture of a CUDA graph, got none")
    out = torch.zeros(len(ranks), channels, columns, dtype=torch.float64)
    for i, rank in enumerate(ranks):
        out[i, :, :rank] = reference.projection(channels, rank, seed)
    return out.to(device)


class _Sequence(NamedTuple):
    begin: int
    frames: int
    rank: int
    columns: int
    num: int
    place: int


def _sequences(spans: list[tuple[int, int]], num: list[int], channels: int, max_rank: int) -> list[_Sequence]:
    budgets = num * len(spans) if len(num) == 1 else num
    out, place = [], 0
    for (a, b), count in zip(spans, budgets):
        if not 0 <= count <= b - a:
            raise ValueError(f"expected num between 0 and the sequence's {b - a} frames, got {count}")
        rank = min(max_rank, (b - a) // 4, channels)
        columns = power_of_2(rank, SIDE) if rank <= LARGEST_RANK else ceil_div(rank, SIDE) * SIDE
        out.append(_Sequence(a, b - a, rank, columns, count, place))
        place += count
    return out


def contour_select(
    x: Tensor, num: list[int], query: Tensor | None, max_rank: int, rule: int, seed: int, cu_seqlens: Tensor | None
) -> Any:
    """See :func:`vidtok.kernels.reference.contour_select.contour_select`."""
    if x.dtype not in DTYPE_CODE:
        return NotImplemented
    n, c = x.shape
    below_2_31(n, "frames")
    # Triton 3.6 cannot feed fp64 products from 16-bit loads; frames are few, so a copy costs little.
    x = x.float()
    query = None if query is None else query.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    sequences = _sequences(bounds(cu_seqlens, n), num, c, max_rank)
    longest = max((s.frames for s in sequences), default=0)
    if rule == FURTHEST and longest > MOST_FRAMES:
        return NotImplemented
    total = sum(s.num for s in sequences)
    index = x.new_empty(total, dtype=torch.int64)
    out = x.new_empty(n, dtype=torch.float32)
    if n == 0:
        return index, out
    distance = x.new_empty(n, dtype=torch.float64)
    contour = x.new_empty(len(sequences), dtype=torch.float64)
    with _common.on_device(x):
        rows: dict[int, list[int]] = {}
        for i, s in enumerate(sequences):
            rows.setdefault(s.columns, []).append(i)
        for columns, group in sorted(rows.items()):
            _distances(x, query, sequences, group, columns, seed, distance, out)
        table = _table(x, sequences, {})
        tiles = _tiles(x, sequences, range(len(sequences)))
        blocks = {"SIDE": SIDE, "BLOCK": 128, "num_warps": 4, **LAUNCH}
        if total:
            count = tiles.shape[0] // 2
            _contours[(count,)](distance, table, tiles, contour, **blocks)
            if rule == STRATIFIED:
                parts = [
                    v
                    for i, s in enumerate(sequences)
                    for p in range(s.num)
                    for v in (i, p * s.frames // s.num, (p + 1) * s.frames // s.num)
                ]
                _stratified[(total,)](
                    distance, table, _common.device_list(parts, x), contour, index, BLOCK=128, num_warps=1, **LAUNCH
                )
            else:
                order = x.new_empty(n, dtype=torch.int32)
                _order[(count,)](distance, table, tiles, contour, order, **blocks)
                if rule == CONTOUR:
                    _nearest[(len(sequences),)](order, table, index, BLOCK=1024, num_warps=4, **LAUNCH)
                else:
                    held = power_of_2(longest, 32)
                    # With 16 warps ptxas, told maxnreg, takes more registers than an SM has.
                    warps = min(max(held // 1024, 1), 8)
                    _furthest[(len(sequences),)](order, table, index, BLOCK=held, num_warps=warps, **LAUNCH)
    return index, out


def _table(x: Tensor, sequences: list[_Sequence], places: dict[int, int]) -> Tensor:
    """The sequences' numbers on the device; ``places`` of the bases of each rank."""
    numbers = [
        v
        for i, s in enumerate(sequences)
        for v in (s.begin, s.frames, s.rank, places.get(s.rank, 0), s.num, s.place, i * x.shape[1])
    ]
    return _common.device_list(numbers, x)


def _tiles(x: Tensor, sequences: list[_Sequence], group: Any) -> Tensor:
    """(sequence, first frame) of every tile of SIDE frames."""
    return _common.device_list([v for i in group for t in range(0, sequences[i].frames, SIDE) for v in (i, t)], x)


def _distances(
    x: Tensor,
    query: Tensor | None,
    sequences: list[_Sequence],
    group: list[int],
    columns: int,
    seed: int,
    distance: Tensor,
    out: Tensor,
) -> None:
    """Distances of the sequences whose bases have as many columns."""
    n, c = x.shape
    ranks = tuple(sorted({sequences[i].rank for i in group if sequences[i].rank}))
    basis = _bases(c, ranks, columns, seed, x.device)
    if x.is_cuda:
        held(basis)
    table = _table(x, sequences, {r: i * c * columns for i, r in enumerate(ranks)})
    tiles = _tiles(x, sequences, group)
    if tiles.numel() == 0:
        return
    longest = max(sequences[i].frames for i in group)
    shape = {"sequences": len(group), "longest": longest, "rank": columns, "channels": c}
    knobs = _common.choice("contour_select", x, shape)
    vector = _vector(x) if query is None else _vector(x, query)
    z = x.new_empty(n, columns, dtype=torch.float64)
    logit = x.new_empty(n, dtype=torch.float64)
    _project[(tiles.shape[0] // 2, columns // SIDE)](
        x, x if query is None else query, basis, table, tiles, z, logit, c // vector, x.stride(0) // vector, columns,
        VECTOR=vector, QUERY=query is not None, SIDE=SIDE, BLOCK=min(knobs["block"], 64), num_warps=4, num_stages=2,
        **LAUNCH,
    )  # fmt: skip
    if columns <= LARGEST_RANK:
        _measure[(len(group),)](
            z, logit, table, _common.device_list(group, x), distance, out, R=columns, BLOCK=min(knobs["block"], 32),
            num_warps=knobs["num_warps"], num_stages=1, **LAUNCH,
        )  # fmt: skip
        return
    for i in group:
        s = sequences[i]
        rows = slice(s.begin, s.begin + s.frames)
        distance[rows] = _measured_by_torch(z[rows, : s.rank], logit[rows], s.rank)
        out[rows] = distance[rows]


def specimens() -> list[Specimen]:
    """Representative compilations."""
    out = []
    signature = {"x": "*fp32", "query": "*fp32", "basis": "*fp64", "table": "*i64", "tiles": "*i64"}
    signature |= {"z": "*fp64", "logit": "*fp64", "channels": "i32", "x_stride": "i32", "columns": "i32"}
    for query in (False, True):
        shape = {"VECTOR": 4, "QUERY": query, "SIDE": SIDE, "BLOCK": 64}
        out.append(Specimen(f"project{' with query' if query else ''}", _project, signature, shape, 4, 2))
    signature = {"z": "*fp64", "logit": "*fp64", "table": "*i64", "sequences": "*i64"}
    signature |= {"distance": "*fp64", "out": "*fp32"}
    for r in (16, 32, 64):
        out.append(Specimen(f"measure {r}", _measure, signature, {"R": r, "BLOCK": 32}, 8, 1))
    common = {"distance": "*fp64", "table": "*i64"}
    blocks = {"SIDE": SIDE, "BLOCK": 128}
    signature = {**common, "tiles": "*i64", "contour": "*fp64"}
    out.append(Specimen("contours", _contours, signature, blocks))
    out.append(Specimen("order", _order, {**signature, "order": "*i32"}, blocks))
    signature = {**common, "parts": "*i64", "contour": "*fp64", "index": "*i64"}
    out.append(Specimen("stratified", _stratified, signature, {"BLOCK": 128}, 1))
    signature = {"order": "*i32", "table": "*i64", "index": "*i64"}
    out.append(Specimen("nearest", _nearest, signature, {"BLOCK": 1024}))
    out.append(Specimen("furthest", _furthest, signature, {"BLOCK": 4096}))
    out.append(Specimen("furthest of 16384", _furthest, signature, {"BLOCK": 16384}, 8))
    return out
