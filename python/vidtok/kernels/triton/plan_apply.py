"""plan_apply and its backward in Triton.

A program owns ROWS outputs by BLOCK channels. Gathers are loads and stores of whole 16-byte vectors; weighted
sums go over the members in list order, in fp32, so no knob changes bits. The backward transposes the lists by a
stable sort (integer work, deterministic, without a sync) and then is the same weighted sum over the transposed
lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE
from vidtok.kernels.native.plan_apply import _members
from vidtok.kernels.triton import _common
from vidtok.kernels.triton._common import (
    LAUNCH,
    POINTER,
    Specimen,
    below_2_31,
    ceil_div,
    code_of,
    power_of_2,
    report,
    report_any,
)  # fmt: skip

_ANCHOR = code_of("plan_apply", "anchor")
_MEMBER = code_of("plan_apply", "member")
_OFFSET = code_of("plan_apply", "offset")
ANCHOR = tl.constexpr(_ANCHOR)
MEMBER = tl.constexpr(_MEMBER)
OFFSET = tl.constexpr(_OFFSET)

# Keys of the transposition that one program writes.
KEYS = 512


# Numbers are not specialised: a kernel serves every shape, and a 1 would reach it as a constant without a type.
@triton.jit(do_not_specialize=["n", "m", "channels", "x_stride"])
def _gather(
    x, out, anchor, n, m, channels, x_stride, error, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows by index, zeros for −1; ``channels`` and ``x_stride`` count vectors of VECTOR elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < m
    source = tl.load(anchor + row, mask=here, other=-1).to(tl.int64)
    if tl.program_id(1) == 0:
        report_any(error, ANCHOR, source, tl.full((), -1, tl.int64), n, (source < -1) | (source >= n))
    known = (source >= 0) & (source < n)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < channels * VECTOR)[None, :]
    at = source[:, None] * (x_stride.to(tl.int64) * VECTOR) + column[None, :]
    value = tl.load(x + at, mask=known[:, None] & inside, other=0.0)
    to = row[:, None] * (channels.to(tl.int64) * VECTOR) + column[None, :]
    tl.store(out + to, value, mask=here[:, None] & inside)


@triton.jit(do_not_specialize=["n", "m", "nnz", "channels", "x_stride"])
def _sum(
    x, out, member, position, offset, weight, n, m, nnz, channels, x_stride, error,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr, INDIRECT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One output row: Σ weight·x[member] over its list, in list order.

    COPY: the row of a list of one goes out bit for bit. INDIRECT: ``position`` orders the weights, as after a
    transposition; the lists are then our own and need no checks.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels * VECTOR
    begin = tl.load(offset + row).to(tl.int64)
    end = tl.load(offset + row + 1).to(tl.int64)
    if not INDIRECT:
        bad = (begin < 0) | (end < begin) | (end > nnz) | ((row == 0) & (begin != 0)) | ((row == m - 1) & (end != nnz))
        if tl.program_id(1) == 0:
            report(error, OFFSET, tl.where(begin < 0, begin, end), tl.full((), 0, tl.int64), nnz + 1, bad)
        end = tl.where(bad, begin, end)
    to = out + row * (channels.to(tl.int64) * VECTOR) + column
    stride = x_stride.to(tl.int64) * VECTOR
    single = COPY and (end - begin == 1)
    if single:
        source = tl.load(member + begin).to(tl.int64)
        known = (source >= 0) & (source < n)
        if tl.program_id(1) == 0:
            report(error, MEMBER, source, tl.full((), 0, tl.int64), n, known == 0)
        tl.store(to, tl.load(x + source * stride + column, mask=inside & known, other=0.0), mask=inside)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        valid = begin == begin
        for j in range(begin, end):
            source = tl.load(member + j).to(tl.int64)
            known = (source >= 0) & (source < n)
            if not INDIRECT and tl.program_id(1) == 0:
                report(error, MEMBER, source, tl.full((), 0, tl.int64), n, known == 0)
            valid = valid & known
            value = tl.load(x + source * stride + column, mask=inside & known, other=0.0).to(tl.float32)
            if WEIGHTED:
                if INDIRECT:
                    value = value * tl.load(weight + tl.load(position + j).to(tl.int64))
                else:
                    value = value * tl.load(weight + j)
            total += value
        tl.store(to, tl.where(valid, total, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "m", "num_in"])
def _keys(
    member, offset, key, owner, count, m, num_in, error,
    LISTS: tl.constexpr, CODE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Input and output row of each pair; pairs to be left out get the input ``num_in``."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = j < count
    source = tl.load(member + j, mask=here, other=0).to(tl.int64)
    lowest = tl.full((), 0 if LISTS else -1, tl.int64)
    report_any(error, CODE, source, lowest, num_in, here & ((source < lowest) | (source >= num_in)))
    known = (source >= 0) & (source < num_in)
    if LISTS:
        # The last row whose list begins at or before j.
        low = tl.zeros((BLOCK,), tl.int64)
        span = tl.zeros((BLOCK,), tl.int64) + m
        for _ in tl.static_range(STEPS):
            half = span // 2
            above = tl.load(offset + low + half, mask=here & (half > 0), other=0).to(tl.int64) <= j
            low = tl.where(above & (half > 0), low + half, low)
            span = tl.where(half > 0, tl.where(above, span - half, half), span)
        begin = tl.load(offset + low, mask=here, other=0)
        end = tl.load(offset + low + 1, mask=here, other=0)
        report_any(error, OFFSET, end, tl.full((), 0, tl.int64), count + 1, here & ((begin > j) | (end <= j)))
        known = known & (begin <= j) & (end > j)
        tl.store(owner + j, low.to(tl.int32), mask=here)
    tl.store(key + j, tl.where(known, source, num_in).to(tl.int32), mask=here)


def _vector(x: Tensor) -> int:
    """Elements of the widest vector, up to 16 bytes, that rows consist of."""
    vector = 16 // x.itemsize
    while x.shape[1] % vector or (x.shape[0] > 1 and x.stride(0) % vector):
        vector //= 2
    return vector


def _shape(x: Tensor, rows: int) -> dict[str, int]:
    return {"rows": rows, "channels": x.shape[1], "itemsize": x.itemsize}


def _launch_sum(
    x: Tensor, out: Tensor, member: Tensor, position: Tensor | None, offset: Tensor, weight: Tensor | None
) -> None:
    """``_sum`` over every row of ``out``; ``position`` orders the weights of transposed lists."""
    m, c = out.shape
    knobs = _common.choice("plan_apply", x, _shape(x, m))
    vector = _vector(x)
    block = power_of_2(c, 16, knobs["block"])
    _sum[(m, ceil_div(c, block))](
        x, out, member, member if position is None else position, offset, member if weight is None else weight,
        x.shape[0], m, member.shape[0], c // vector, x.stride(0) // vector, _common.error_words(x),
        VECTOR=vector, BLOCK=block, COPY=position is None, INDIRECT=position is not None,
        WEIGHTED=weight is not None, num_warps=knobs["num_warps"], **LAUNCH,
    )  # fmt: skip


def plan_apply(x: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply`."""
    if x.dtype not in DTYPE_CODE or anchor.dtype is not torch.int32:
        return NotImplemented
    n, c = x.shape
    m = anchor.shape[0]
    nnz = 0 if member is None else _members(m, member, offset, weight)
    for what, count in (("tokens", n), ("outputs", m), ("members", nnz)):
        below_2_31(count, what)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(m, c)
    error = _common.error_words(x)
    if m == 0 or c == 0:
        return out
    with _common.on_device(x):
        if member is None:
            knobs = _common.choice("plan_apply", x, _shape(x, m))
            vector = _vector(x)
            block = power_of_2(c, 16, knobs["block"])
            rows = knobs["block"] // block
            _gather[(ceil_div(m, rows), ceil_div(c, block))](
                x, out, anchor, n, m, c // vector, x.stride(0) // vector, error,
                VECTOR=vector, ROWS=rows, BLOCK=block, num_warps=knobs["num_warps"], **LAUNCH,
            )  # fmt: skip
        else:
            assert offset is not None and weight is not None
            _launch_sum(x, out, member, None, offset, weight)
    _common.check(x)
    return out


def plan_apply_backward(
    grad: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None, num_in: int
) -> Any:
    """See :func:`vidtok.kernels.reference.plan_apply.plan_apply_backward`."""
    if grad.dtype not in DTYPE_CODE or anchor.dtype is not torch.int32:
        return NotImplemented
    m, c = grad.shape
    if anchor.shape[0] != m:
        raise IndexError(f"expected anchor of {m} outputs, got {anchor.shape[0]}")
    nnz = 0 if member is None else _members(m, member, offset, weight)
    for what, count in (("inputs", num_in), ("outputs", m), ("members", nnz)):
        below_2_31(count, what)
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    out = grad.new_empty(num_in, c)
    error = _common.error_words(grad)
    if num_in == 0 or c == 0:
        return out
    source = anchor if member is None else member
    count = source.shape[0]
    if count == 0:
        return out.zero_()
    with _common.on_device(grad):
        key = torch.empty_like(source)
        owner = source if member is None else torch.empty_like(source)
        _keys[(ceil_div(count, KEYS),)](
            source, source if offset is None else offset, key, owner, count, m, num_in, error,
            LISTS=member is not None, CODE=_ANCHOR if member is None else _MEMBER,
            STEPS=m.bit_length() + 1 if member is not None else 0, BLOCK=KEYS, num_warps=4, **LAUNCH,
        )  # fmt: skip
        # A stable sort leaves the pairs of one input in the order of the lists.
        key, position = torch.sort(key, stable=True)
        starts = torch.searchsorted(key, torch.arange(num_in + 1, dtype=torch.int32, device=key.device), out_int32=True)
        rows = position if member is None else owner.index_select(0, position)
        _launch_sum(grad, out, rows, position, starts, weight)
    _common.check(grad)
    return out


def specimens() -> list[Specimen]:
    """Representative compilations."""
    out = []
    for dtype, pointer in POINTER.items():
        vector = 16 // dtype.itemsize
        name = pointer[1:]
        sizes = {"channels": "i32", "x_stride": "i32", "error": "*i32"}
        blocks = {"VECTOR": vector, "BLOCK": 1024}
        signature = {"x": pointer, "out": pointer, "anchor": "*i32", "n": "i32", "m": "i32", **sizes}
        out.append(Specimen(f"gather {name}", _gather, signature, {**blocks, "ROWS": 1}))
        lists = {"member": "*i32", "position": "*i32", "offset": "*i32", "weight": "*fp32"}
        signature = {"x": pointer, "out": pointer, **lists, "n": "i32", "m": "i32", "nnz": "i32", **sizes}
        listed = {**blocks, "COPY": True, "INDIRECT": False, "WEIGHTED": True}
        out.append(Specimen(f"sum {name}", _sum, signature, listed))
        transposed = {**blocks, "COPY": False, "INDIRECT": True, "WEIGHTED": True}
        out.append(Specimen(f"transposed sum {name}", _sum, {**signature, "position": "*i64"}, transposed))
    signature = {"member": "*i32", "offset": "*i32", "key": "*i32", "owner": "*i32"}
    signature |= {"count": "i32", "m": "i32", "num_in": "i32", "error": "*i32"}
    out.append(Specimen("keys", _keys, signature, {"LISTS": True, "CODE": _MEMBER, "STEPS": 16, "BLOCK": KEYS}))
    return out
