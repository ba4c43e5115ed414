"""What GPU kernels report of bad indices: a few words per device that the host reads without waiting.

A kernel that meets an index outside its data goes on without the access and stores (code, value, low, high). The
next call on that device, or :func:`synchronize`, raises what they say. Codes from :data:`TRITON` on are Triton's, those
below the CUDA module's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

TRITON = 1000
_WORDS = 8
# Counts are wrong values, everything else is an index outside its data.
_COUNTS = ("keep", "num", "num_clusters")
# (operator, list) of a code, by backend; each registers its own.
_names: dict[int, Callable[[int], tuple[str, str]]] = {}


def register(base: int, name: Callable[[int], tuple[str, str]]) -> None:
    """Let ``name`` say what codes from ``base`` on are about."""
    _names[base] = name


class Words:
    """The words of one device (−1: CPU tensors served by a stand-in)."""

    def __init__(self, index: int) -> None:
        words = torch.zeros(_WORDS, dtype=torch.int32)
        # Pinned: a kernel can write to it, which it does only when an index is bad.
        self.tensor = words if index < 0 else words.pin_memory()
        self.address = self.tensor.data_ptr()
        self.view: Any = memoryview(self.tensor.numpy())  # type: ignore[arg-type]

    def raise_pending(self, late: bool) -> None:
        """Raise what kernels have stored, once; nothing when they stored nothing."""
        code, value, low, high = self.view[:4].tolist()
        if code == 0:
            return
        for i in range(_WORDS):
            self.view[i] = 0
        base = TRITON if code >= TRITON else 0
        operator, name = _names[base](code - base)
        when = "an earlier call of " if late else ""
        error = ValueError if name in _COUNTS else IndexError
        raise error(f"{when}{operator}: expected {name} in [{low}, {high}), got {value}")


@lru_cache(maxsize=64)
def words(index: int) -> Words:
    """The words of a device."""
    return Words(index)


def synchronize(device: torch.device | int | None = None) -> None:
    """Wait for a GPU and raise what vidtok's kernels on it have reported.

    Args:
        device: a CUDA device or its index; the current one by default.

    Raises:
        IndexError: a plan, offsets or spans pointed outside their data; the access was left out.
        ValueError: a count on the device was outside its range.
    """
    torch.cuda.synchronize(device)
    index = device.index if isinstance(device, torch.device) else device
    words(torch.cuda.current_device() if index is None else index).raise_pending(late=True)
