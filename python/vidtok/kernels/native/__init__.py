"""Calls into the compiled extension: pointers and sizes in, a status out, one file per operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidtok.kernels import select

# The numbers are those of csrc/include/vidtok/common.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ERRORS: dict[str, type[Exception]] = {"index": IndexError, "value": ValueError}

num_threads: Callable[[], int] = torch.get_num_threads


def pointer(t: Tensor | None) -> int:
    """Address of a contiguous tensor's data, 0 for None."""
    if t is None:
        return 0
    if not t.is_contiguous():
        raise ValueError(f"expected contiguous index lists, got strides {t.stride()}")
    return t.data_ptr()


def check(status: int, operator: str) -> None:
    """Raise what a kernel's status says."""
    if status:
        code, message = select.extension().last_error(status)
        raise _ERRORS.get(code, RuntimeError)(f"{operator}: {message}")


def extension() -> Any:
    """The compiled module."""
    return select.extension()
