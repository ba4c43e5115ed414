"""Tensors that end, or begin, at an inaccessible page, and allocation that is poisoned.

Sanitizers are blind to masked, gathered and streamed AVX-512 accesses; a page without rights is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, at: str) -> Tensor:
    """Uninitialised tensor whose last (``at="end"``) or first (``at="begin"``) byte touches a closed page."""
    elements = 1
    for size in shape:
        elements *= size
    size = elements * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    body = -(-size // _PAGE) * _PAGE
    area = mmap.mmap(-1, body + 2 * _PAGE)
    raw = (ctypes.c_char * (body + 2 * _PAGE)).from_buffer(area)
    base = ctypes.addressof(raw)
    for page in (base, base + _PAGE + body):
        if _libc.mprotect(page, _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = _PAGE + (body - size if at == "end" else 0)
    flat = torch.frombuffer(raw, dtype=torch.uint8, count=size, offset=start)
    return flat.view(dtype).view(shape)


def guarded(t: Tensor, at: str) -> Tensor:
    """Contiguous copy of ``t`` beside a closed page."""
    out = guarded_empty(tuple(t.shape), t.dtype, at)
    out.copy_(t)
    return out


def map_tensors(value: Any, fn: Any) -> Any:
    """``value`` with ``fn`` applied to every tensor inside."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_tensors(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    return value


def poison(t: Tensor) -> Tensor:
    """Fill with NaN, or a value no index may have; scratch memory with bytes that are NaN or −1 in every type."""
    if t.dtype == torch.uint8:
        return t.fill_(255)
    return t.fill_(float("nan") if t.is_floating_point() else (True if t.dtype == torch.bool else -(2**30)))


@contextlib.contextmanager
def poisoned_allocation(at: str | None = None) -> Iterator[None]:
    """Inside, ``Tensor.new_empty`` gives poisoned memory, beside a closed page if ``at`` says where."""
    original = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        out = original(self, *size, **options)
        if out.device.type not in ("cpu", "cuda") or out.dtype not in (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.int32,
            torch.int64,
            torch.uint8,
            torch.bool,
        ):
            return out
        if at is not None and type(out) is Tensor and out.is_cpu:
            out = guarded_empty(tuple(out.shape), out.dtype, at)
        return poison(out)

    Tensor.new_empty = new_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.new_empty = original  # type: ignore[method-assign]
