"""Small lists of numbers that the host knows, as tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Lists that a captured CUDA graph reads must outlive the cache.
_captured: list[Any] = []


def held(value: Any) -> Any:
    """``value`` itself, out of a cache of what lies on a GPU; for good where a CUDA graph being captured reads it."""
    if torch.cuda.is_current_stream_capturing():
        _captured.append(value)
    return value


class _Uploaded:
    """A shared tensor; on a GPU with the streams that its upload is ordered before."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.done: Any = None
        self.streams: set[int] = set()
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            self.done = stream.record_event()
            self.streams.add(stream.cuda_stream)

    def follow(self, stream: Any) -> None:
        """Let ``stream`` wait for the upload, and memory that is freed later wait for ``stream``."""
        stream.wait_event(self.done)
        self.tensor.record_stream(stream)
        self.streams.add(stream.cuda_stream)


@lru_cache(maxsize=4096)
def _upload(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Uploaded:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("expected a call with the same counts before the capture of a CUDA graph, got none")
    out = torch.tensor(values, dtype=dtype)
    # From pinned memory the copy does not wait for the kernels before it.
    return _Uploaded(out.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else out.to(device))


def shared(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that all callers with these numbers share; nobody may write to it.

    It is uploaded once, so that later calls neither wait for the GPU nor stand in the way of a graph's capture.
    """
    found = _upload(tuple(values), dtype, device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            # A capture begins after a synchronisation, and may not wait for what was recorded outside it.
            _captured.append(found.tensor)
        elif torch._C._cuda_getCurrentRawStream(device.index) not in found.streams:
            found.follow(torch.cuda.current_stream(device))
    return found.tensor


def constant(values: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``values`` as a tensor: the shared one on a GPU, a new one elsewhere."""
    device = torch.device(device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return shared(values, dtype, device)
