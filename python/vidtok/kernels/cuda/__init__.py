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
from vidtok.kernels import reports, select
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
    "workspace",
]

# As the tuning tables name them.
DTYPE_NAME = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPE_CODE}
_ERRORS: dict[str, type[Exception]] = {"index": IndexError, "value": ValueError, "memory": MemoryError}


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
    # Machine code runs on its own major version from its minor version up; PTX on everything newer, but launchers
    # lay out shared memory for the GPU, and from sm_80 on kernels lay it out otherwise.
    if any(major == s // 10 and s <= sm for s in info["sms"]):
        return None
    if any(p <= sm and (p >= 80) == (sm >= 80) for p in info["ptx"]):
        return None
    built = ", ".join(f"sm_{s}" for s in info["sms"])
    return f"GPU {device} is sm_{sm} and this build holds {built}: reinstall with VIDTOK_CUDA_ARCHS={sm}"


class _Device:
    """What launches on one GPU share: its SM, its SM count and the words kernels report to."""

    def __init__(self, index: int) -> None:
        self.index = index
        if index < 0:
            self.sm = int(os.environ.get("VIDTOK_CUDA_SM") or extension().build_info()["sms"][0])
            self.sms = 4
        else:
            self.sm = select.sm_of(index)
            self.sms = torch.cuda.get_device_properties(index).multi_processor_count
        self.words = reports.words(index)


@lru_cache(maxsize=64)
def _device(index: int) -> _Device:
    return _Device(index)


def launch(x: Tensor) -> Launch:
    """Stream, error words and SM for a call that computes with ``x``; raises what an earlier kernel reported."""
    device = _device(x.get_device())
    if device.sm < 80 and x.dtype is torch.bfloat16:
        raise ValueError(f"bf16 needs sm_80 or newer, got sm_{device.sm}")
    if device.words.view[0]:
        device.words.raise_pending(late=True)
    stream = 0 if device.index < 0 else torch._C._cuda_getCurrentRawStream(device.index)
    return Launch(stream, device.words.address, device.sm, device.sms)


def check(status: int, operator: str, x: Tensor) -> None:
    """Raise what a launch's status says; call it after every launch. On the host, also what the kernel reported."""
    if status:
        code, message = extension().last_error(status)
        raise _ERRORS.get(code, RuntimeError)(f"{operator}: {message}")
    if not x.is_cuda and _device(-1).words.view[0]:
        _device(-1).words.raise_pending(late=False)


reports.register(0, lambda code: extension().report_name(code))


def workspace(x: Tensor, nbytes: int) -> Tensor | None:
    """Scratch memory from torch's allocator on the device of ``x``; None for 0 bytes."""
    return x.new_empty(nbytes, dtype=torch.uint8) if nbytes else None


def device_list(values: Sequence[int], x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers the host knows, on the device of ``x``; uploaded once per value, so that a graph can be captured."""
    return _constant.shared(values, dtype, x.device)
