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
            return gpu(_gpu_index(args), args)

        LIB.impl(name, cpu, "CPU")
        LIB.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"vidtok::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"vidtok::{name}", backward, setup_context=setup_context, lib=LIB)
    return getattr(torch.ops.vidtok, name).default


def _gpu_index(args: tuple[Any, ...]) -> int:
    """Index of the GPU that the arguments lie on; raises where they lie on two."""
    found: int | None = None
    for arg in args:
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(t, Tensor) and t.is_cuda:
                index = t.get_device()
                if found is not None and index != found:
                    raise ValueError(f"expected all tensors on cuda:{found}, got one on cuda:{index}")
                found = index
    assert found is not None
    return found


def needs_grad(x: Tensor) -> bool:
    """Whether a gradient is asked for with respect to ``x``."""
    return x.requires_grad and torch.is_grad_enabled()


def dynamic_size() -> Any:
    """An output size that only the data decides, for fake kernels."""
    return torch.library.get_ctx().new_dynamic_size()
