"""Small lists of numbers that the host knows, as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Lists that a captured CUDA graph reads must outlive the cache.
_captured: list[Tensor] = []


@lru_cache(maxsize=4096)
def _upload(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("expected a call with the same counts before the capture of a CUDA graph, got none")
    out = torch.tensor(values, dtype=dtype)
    # From pinned memory the copy does not wait for the kernels before it.
    return out.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else out.to(device)


def shared(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that all callers with these numbers share; nobody may write to it.

    It is uploaded once, so that later calls neither wait for the GPU nor stand in the way of a graph's capture.
    """
    out = _upload(tuple(values), dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(out)
    return out


def constant(values: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``values`` as a tensor: the shared one on a GPU, a new one elsewhere."""
    device = torch.device(device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return shared(values, dtype, device)
