"""What every Triton kernel shares: rounding grids, order keys, exact radix selection, error reports, launches."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidtok._check import below_2_31
from vidtok.kernels import reports, select, tables
from vidtok.kernels.cuda import device_list

__all__ = [
    "INTERPRETED", "LAUNCH", "POINTER", "Specimen", "below_2_31", "ceil_div", "check", "choice", "code_of",
    "cosine_steps", "device_list", "error_words", "on_device", "power_of_2", "vector",
]  # fmt: skip

# Contraction is left to tl.fma and tl.dot: whether a product and a sum fuse must not depend on the compiler's
# version, since the CPU backends compile with -ffp-contract=off and the order of two scores hangs on the last bit.
# maxnreg: left alone, ptxas aims at an occupancy and spills a few registers for it.
LAUNCH = {"enable_fp_fusion": False, "maxnreg": 255}

# Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def _mend_interpreter() -> None:
    """numpy 2.4 turns no array of one element into an int, and the interpreter's loops over run-time bounds do."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


_INTERPRETED = tl.constexpr(INTERPRETED)
if INTERPRETED:
    _mend_interpreter()

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Specimen(NamedTuple):
    """One representative compilation of a kernel, for checks without a GPU."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


# ---------------------------------------------------------------------- launches
def choice(op: str, x: Tensor, shape: dict[str, int]) -> dict[str, int]:
    """Block sizes, warps and stages for a call on the device of ``x``, from the tables."""
    sm = select.sm_of(x.get_device()) if x.is_cuda else int(os.environ.get("VIDTOK_CUDA_SM") or 80)
    return tables.choose("triton", op, sm, _NAMES.get(x.dtype) or str(x.dtype).removeprefix("torch."), shape)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two of at least ``n``, between the two bounds."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def vector(x: Tensor, *strides: int) -> int:
    """How many elements of 16 bytes divide every stride; 1 where they do not.

    Kernels take strides in this unit and multiply by it, which tells the compiler that wide loads are aligned
    without a variant for every stride.
    """
    unit = 16 // x.element_size()
    return 1 if any(s % unit for s in strides) else unit


def cosine_steps(dtype: torch.dtype) -> float:
    """Grid steps per unit of a cosine of this input dtype, as in the reference."""
    return 2.0**20 if dtype == torch.float32 else 2.0**16


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of ``x`` the current one where it is not; Triton launches on the current device's stream."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


# ---------------------------------------------------------------------- error reports
# A kernel that meets a bad index writes (code, value, low, high), see kernels/reports.py.
_REPORTS: tuple[tuple[str, str], ...] = (
    ("topk_select", "keep"),
    ("topk_select", "cu_seqlens"),
    ("plan_apply", "anchor"),
    ("plan_apply", "member"),
    ("plan_apply", "offset"),
    ("position_remap", "anchor"),
    ("pool_packed", "grid_thw"),
    ("adjacent_similarity", "grid_thw"),
    ("cluster_dpc_knn", "num_clusters"),
    ("cluster_dpc_knn", "cu_seqlens"),
    ("contour_select", "num"),
    ("contour_select", "cu_seqlens"),
)


def code_of(operator: str, name: str) -> int:
    """Number of a report."""
    return reports.TRITON + _REPORTS.index((operator, name))


reports.register(reports.TRITON, lambda code: _REPORTS[code])


def error_words(x: Tensor) -> Tensor:
    """Where kernels on the device of ``x`` report bad indices; raises what an earlier kernel reported."""
    words = reports.words(x.get_device())
    if words.view[0]:
        words.raise_pending(late=True)
    return words.tensor


def check(x: Tensor) -> None:
    """In the interpreter, raise what the kernels just launched have reported."""
    if not x.is_cuda and reports.words(-1).view[0]:
        reports.words(-1).raise_pending(late=False)


@triton.jit
def report(error, code: tl.constexpr, value, low, high, bad):
    """Write a report where the scalar ``bad`` holds; the first word last, so that the host never reads half of it."""
    tl.store(error + 1, value.to(tl.int32), mask=bad)
    tl.store(error + 2, low.to(tl.int32), mask=bad)
    tl.store(error + 3, high.to(tl.int32), mask=bad)
    tl.store(error, code, mask=bad)


@triton.jit
def report_any(error, code: tl.constexpr, value, low, high, bad):
    """Write a report for the largest of the values of a block where ``bad`` holds."""
    worst = tl.max(tl.where(bad, value.to(tl.int64), -(2**62)), axis=0)
    report(error, code, worst, low, high, worst > -(2**62))


# ---------------------------------------------------------------------- rounding grids
@triton.jit
def rint(x):
    """Round half to even for |x| ≤ 2²²; NaN stays."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp_unit(x):
    """Clamp to [−1, 1]; NaN stays."""
    x = tl.where(x > 1.0, 1.0, x)
    return tl.where(x < -1.0, -1.0, x)


@triton.jit
def round_cosine(cosine, STEPS: tl.constexpr):
    """Clamp to [−1, 1] and round to multiples of 1/STEPS; NaN stays."""
    return rint(clamp_unit(cosine) * STEPS) * (1.0 / STEPS)


@triton.jit
def cosine_key(cosine, STEPS: tl.constexpr):
    """The rounded cosine in grid steps as int32; NaN becomes −STEPS − 1, below every number."""
    steps = rint(clamp_unit(cosine) * STEPS)
    nan = steps != steps
    return tl.where(nan, -STEPS - 1.0, steps).to(tl.int32)


@triton.jit
def round_16_bits(x):
    """Round fp32 of at least 0 to 16 significant bits, half to even; NaN and infinity stay."""
    # Subnormal numbers have fewer bits left of the cut: they are brought up by 2²⁴ and back, both exact.
    small = x < 1.1754943508222875e-38
    bits = tl.where(small, x * 16777216.0, x).to(tl.int32, bitcast=True)
    rounded = ((bits + 127 + ((bits >> 8) & 1)) & -256).to(tl.float32, bitcast=True)
    rounded = tl.where(small, rounded * 5.9604644775390625e-08, rounded)
    return tl.where(x < float("inf"), rounded, x)


@triton.jit
def inverse_norm(squared):
    """1/√squared, 0 for 0, NaN for NaN and infinity; rounded as the reference rounds it."""
    inverse = tl.where(squared == 0.0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(squared)))
    return tl.where(squared < float("inf"), inverse, float("nan"))


# ---------------------------------------------------------------------- order
@triton.jit
def order_key(score):
    """Score as uint32 of the same order (16 bits for a 16-bit score): larger is better, −0 equals 0, NaN is 0, last."""
    # Negative numbers: flip all bits; others: set the top bit. −inf keeps a key above 0. Bits only, so that
    # subnormal numbers keep their order whatever the hardware does with them.
    if score.dtype.primitive_bitwidth == 32:
        bits = score.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, ~bits, bits | -2147483648)
        zero, magnitude, infinity = -2147483648, bits & 0x7FFFFFFF, 0x7F800000
    else:
        bits = score.to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(bits < 0, ~bits, bits | 0x8000) & 0xFFFF
        zero, magnitude, infinity = 0x8000, bits & 0x7FFF, 0x7F80 if score.dtype == tl.bfloat16 else 0x7C00
    key = tl.where(magnitude == 0, zero, key)
    return tl.where(magnitude > infinity, 0, key).to(tl.uint32, bitcast=True)


@triton.jit
def best_digit(histogram, wanted, BINS: tl.constexpr):
    """(digit that holds the ``wanted``-th best, how many are above that digit)."""
    bins = tl.arange(0, BINS)
    from_here = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    digit = tl.max(tl.where(from_here >= wanted, bins, 0), axis=0)
    above = tl.sum(tl.where(bins > digit, histogram, 0), axis=0)
    return digit, above


# ---------------------------------------------------------------------- exponential
@triton.jit
def exp_not_above_0(x):
    """eˣ within one unit in the last place for x ≤ 0 (the hardware's exp2 is four times coarser); NaN stays."""
    # Scores are rounded to 16 bits: every bit of error here moves more of them across a rounding boundary.
    bounded = tl.where(x < -104.0, -104.0, x)
    n = rint(bounded * 1.4426950408889634)
    r = tl.fma(n, -0.693145751953125, bounded)
    r = tl.fma(n, -1.4286068203094172e-06, r)
    y = tl.fma(r, 0.0001984126984126984, 0.001388888888888889)
    y = tl.fma(y, r, 0.008333333333333333)
    y = tl.fma(y, r, 0.041666666666666664)
    y = tl.fma(y, r, 0.16666666666666666)
    y = tl.fma(y, r, 0.5)
    y = tl.fma(y * r, r, r) + 1.0
    # 2ⁿ in two halves, as n goes below the least exponent.
    whole = tl.where(x != x, 0.0, n).to(tl.int32)
    half = whole >> 1
    y *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    y *= ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -104.0, 0.0, y)


@triton.jit
def dot(a, b, products):
    """products + a·b with fp32 sums: tensor cores for 16-bit inputs, true fp32 for fp32."""
    if _INTERPRETED:
        # The interpreter takes the bits of bf16 for integers here; products of two 16-bit floats are exact in fp32.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, products, input_precision="ieee")
