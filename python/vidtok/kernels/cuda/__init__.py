"""Calls into the compiled CUDA kernels: pointers, sizes and a stream in, a status out, one file per operator.

The module is ``vidtok._cuda``, or the file that ``VIDTOK_CUDA_MODULE`` names: an image for another SM, or
the kernels compiled for the host, which take CPU tensors (tests run them so where no GPU is at hand).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok import _constant
from vidtok.kernels import select
from vidtok.kernels.native import DTYPE_CODE, pointer

__all__ = [
    "DTYPE_CODE",
    "DTYPE_NAME",
    "Launch",
    "check",
    "device_list",
    "extension",
    "launch",
    "obstacle",
    "pointer",
    "refuse_long",
    "workspace",
]

# As the tuning tables name them.
DTYPE_NAME = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPE_CODE}
_ERRORS: dict[str, type[Exception]] = {"index": IndexError, "value": ValueError, "memory": MemoryError}
_ERROR_WORDS = 8


class Launch(NamedTuple):
    """Where a call runs; the first arguments of every function of the module."""

    stream: int
    error: int  # address of the words that kernels report bad indices to
    sm: int
    sms: int


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str | None]:
    """(the module or None, why it is missing)."""
    path = os.environ.get("VIDTOK_CUDA_MODULE")
    try:
        if not path:
            from vidtok import _cuda  # type: ignore[attr-defined]

            return _cuda, None
        spec = importlib.util.spec_from_file_location("_cuda", path)
        if spec is None or spec.loader is None:
            return None, f"VIDTOK_CUDA_MODULE names no extension module ({path})"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, None
    except (ImportError, OSError) as error:
        return None, f"the CUDA extension is missing ({error})"


def extension() -> Any:
    """The compiled module; None when it is missing."""
    return _load()[0]


def on_host() -> bool:
    """Whether the module is the kernels' host twin, which takes CPU tensors."""
    return extension() is not None and bool(extension().build_info()["host"])


def obstacle(device: int | None) -> str | None:
    """Why the module cannot serve a GPU (None: CPU tensors), or None."""
    module, why = _load()
    if module is None:
        return why
    info = module.build_info()
    if device is None:
        return None if info["host"] else "CPU tensors need a module compiled for the host (VIDTOK_CUDA_MODULE)"
    if info["host"]:
        return "VIDTOK_CUDA_MODULE names a module compiled for the host, which takes CPU tensors only"
    sm = select.sm_of(device)
    major = sm // 10
    # Machine code runs on its own major version from its minor version up; PTX on everything newer.
    if any(major == s // 10 and s <= sm for s in info["sms"]) or any(p <= sm for p in info["ptx"]):
        return None
    built = ", ".join(f"sm_{s}" for s in info["sms"])
    return f"GPU {device} is sm_{sm} and this build holds {built}: reinstall with VIDTOK_CUDA_ARCHS={sm}"


class _Device:
    """What launches on one GPU share: its SM, its SM count and the words kernels report to."""

    def __init__(self, index: int) -> None:
        host = index < 0
        self.index = index
        if host:
            info = extension().build_info()
            self.sm = int(os.environ.get("VIDTOK_CUDA_SM") or info["sms"][0])
            self.sms = 4
            self.error = torch.zeros(_ERROR_WORDS, dtype=torch.int32)
        else:
            self.sm = select.sm_of(index)
            self.sms = torch.cuda.get_device_properties(index).multi_processor_count
            # Pinned memory: a kernel writes to it only when an index is bad, and the host reads it without a sync.
            self.error = torch.zeros(_ERROR_WORDS, dtype=torch.int32).pin_memory()
        self.words = memoryview(self.error.numpy())  # type: ignore[arg-type]
        self.address = self.error.data_ptr()


@lru_cache(maxsize=64)
def _device(index: int) -> _Device:
    return _Device(index)


def _raise_pending(device: _Device, late: bool) -> None:
    code, value, low, high = device.words[:4].tolist()
    for i in range(_ERROR_WORDS):
        device.words[i] = 0
    operator, name = extension().report_name(code)
    when = "an earlier call of " if late else ""
    raise IndexError(f"{when}{operator}: expected {name} in [{low}, {high}), got {value}")


def launch(x: Tensor) -> Launch:
    """Stream, error words and SM for a call on the device of ``x``; raises what an earlier kernel reported."""
    device = _device(x.get_device())
    if device.words[0]:
        _raise_pending(device, late=True)
    stream = 0 if device.index < 0 else torch._C._cuda_getCurrentRawStream(device.index)
    return Launch(stream, device.address, device.sm, device.sms)


def check(status: int, operator: str, x: Tensor) -> None:
    """Raise what a launch's status says; call it after every launch. On the host, also what the kernel reported."""
    if status:
        code, message = extension().last_error(status)
        raise _ERRORS.get(code, RuntimeError)(f"{operator}: {message}")
    if not x.is_cuda:
        device = _device(-1)
        if device.words[0]:
            _raise_pending(device, late=False)


def synchronize(device: torch.device | int | None = None) -> None:
    """Wait for a GPU and raise what its kernels reported."""
    index = torch.cuda.current_device() if device is None else torch.device("cuda", device).index  # type: ignore[arg-type]
    torch.cuda.synchronize(index)
    if _device(index).words[0]:
        _raise_pending(_device(index), late=True)


def refuse_long(count: int, what: str) -> None:
    """Raise where int32 indices cannot name so many rows."""
    if count > 2**31 - 1:
        raise ValueError(f"expected fewer than 2147483648 {what}, got {count}")


def workspace(x: Tensor, nbytes: int) -> Tensor | None:
    """Scratch memory from torch's allocator on the device of ``x``; None for 0 bytes."""
    return x.new_empty(nbytes, dtype=torch.uint8) if nbytes else None


def device_list(values: Sequence[int], x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers the host knows, on the device of ``x``; uploaded once per value, so that a graph can be captured."""
    return _constant.shared(values, dtype, x.device)
