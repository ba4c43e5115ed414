"""Registration of the operators with torch: schema, implementations, fake kernel, autograd.

An operator that carries gradients is registered twice, ``x`` without autograd and ``x_grad`` with
it, because an autograd registration costs 3 to 5 µs per call even under ``no_grad``; the public
function calls the second only when a gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidtok.kernels import select
from vidtok.kernels.select import state

LIB = torch.library.Library("vidtok", "FRAGMENT")


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Callable[..., Any] | None = None,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``vidtok::name`` and return its overload.

    Args:
        reference: plain torch, for every device.
        native: the compiled kernel for CPU tensors; returns NotImplemented for what it leaves to the reference.
            The GPU backends hold the same function in the file of the same name.
    """
    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    if native is not None:
        native_kernel, file, function = native, native.__module__.rsplit(".", 1)[1], native.__name__
        compiled = select.holds(name.removesuffix("_grad"))
        names = tuple(a.name for a in getattr(torch.ops.vidtok, name).default._schema.arguments)

        def cpu(*args: Any) -> Any:
            if state.native and compiled:
                out = native_kernel(*args)
                if out is not NotImplemented:
                    return out
            elif state.stand_in is not None:
                return gpu(None, args)
            return reference(*args)

        def gpu(device: int | None, args: tuple[Any, ...]) -> Any:
            for kernel in select.gpu_kernels(name, file, function, device):
                out = kernel(*args)
                if out is not NotImplemented:
                    return out
            return reference(*args)

        def cuda(*args: Any) -> Any:
            if state.requested == "reference":
                return reference(*args)
            index = _gpu_index(names, args)
            if index == torch._C._cuda_getDevice():
                return gpu(index, args)
            with torch.cuda.device(index):
                return gpu(index, args)

        LIB.impl(name, cpu, "CPU")
        LIB.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"vidtok::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"vidtok::{name}", backward, setup_context=setup_context, lib=LIB)
    return getattr(torch.ops.vidtok, name).default


# Lists of a few numbers, which callers give as Python lists or read on the host; kernels copy them to the device.
_ON_HOST = ("grid", "grid_in", "grid_out", "window", "span", "group", "num_clusters")


def _gpu_index(names: tuple[str, ...], args: tuple[Any, ...]) -> int:
    """Index of the GPU that the arguments lie on; raises where they lie on two, or partly on the host."""
    found = -1
    for name, arg in zip(names, args):
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            if not isinstance(t, Tensor) or (t.is_cpu and name in _ON_HOST):
                continue
            index = t.get_device()
            if found < 0 and t.is_cuda:
                found = index
            if index != found or not t.is_cuda:
                raise ValueError(f"expected all tensors on one GPU, got {name} on {t.device} {_beside(names, args, t)}")
    return found


def _beside(names: tuple[str, ...], args: tuple[Any, ...], t: Tensor) -> str:
    """Where another tensor of the call lies."""
    for name, arg in zip(names, args):
        for other in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(other, Tensor) and other.device != t.device and name not in _ON_HOST:
                return f"and {name} on {other.device}"
    return "alone"


def needs_grad(x: Tensor) -> bool:
    """Whether a gradient is asked for with respect to ``x``."""
    return x.requires_grad and torch.is_grad_enabled()


def dynamic_size() -> Any:
    """An output size that only the data decides, for fake kernels."""
    return torch.library.get_ctx().new_dynamic_size()
