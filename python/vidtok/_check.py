"""Argument checks that name what was expected and what came."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The reference also serves as the fp64 oracle of the tests.
_FLOAT_DTYPES_OR_ORACLE = frozenset((*FLOAT_DTYPES, torch.float64))

# Reading the commonest shapes anew would cost a microsecond per call.
_RANKS = {
    "[N, C]": (2,),
    "[T, C]": (2,),
    "[N] or [B, N]": (1, 2),
    "[B, T, C]": (3,),
    "[B, T, C] or [B, H, T, D]": (3, 4),
    "[B, Hq, W, D]": (4,),
    "[B, Hkv, L, D]": (4,),
}


def describe(value: object) -> str:
    """Short description of an argument for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)


def fail(expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with "expected …, got …"."""
    raise error(f"expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def float_tensor(x: object, name: str, shape: str) -> None:
    """Check that ``x`` is a floating tensor whose rank matches ``shape`` such as ``[B, T, C]``."""
    if not isinstance(x, Tensor):
        fail(f"{name} to be a tensor of shape {shape}", type(x).__name__, TypeError)
    if x.dtype not in _FLOAT_DTYPES_OR_ORACLE:
        fail(f"{name} in float32, bfloat16 or float16", str(x.dtype), TypeError)
    ranks = _RANKS.get(shape) or tuple(s.count(",") + 1 for s in shape.split(" or "))
    if x.dim() not in ranks:
        fail(f"{name} of shape {shape}", str(list(x.shape)))


def contiguous(x: Tensor) -> Tensor:
    """``x`` itself when it is contiguous, else one copy."""
    return x if x.is_contiguous() else x.contiguous()


def decided_from(x: Tensor) -> Tensor:
    """``x`` without its gradient and contiguous; decisions are not differentiable."""
    if x.requires_grad:
        x = x.detach()
    return x if x.is_contiguous() else x.contiguous()


def cu_seqlens(cu: Tensor, total: int, name: str = "cu_seqlens") -> Tensor:
    """Check offsets ``[B+1]`` that start at 0, never fall and end at ``total``; return them as int32.

    The values are read only outside traced code; inside it the operator itself checks them.
    """
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
        fail(f"{name} as int32 offsets of shape [B+1]", cu)
    if not torch.compiler.is_compiling() and cu.device.type == "cpu":
        values = cu.tolist()
        if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:])):
            shown = values if len(values) <= 12 else [*values[:6], "...", *values[-3:]]
            fail(f"{name} that start at 0, never fall and end at {total}", str(shown))
    return contiguous(cu if cu.dtype == torch.int32 else cu.to(torch.int32))


def below_2_31(count: int, what: str) -> None:
    """Refuse more than int32 indices can name."""
    if count >= 2**31:
        raise ValueError(f"expected fewer than 2147483648 {what}, got {count}")
