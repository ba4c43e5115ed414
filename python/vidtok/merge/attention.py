"""Attention in which a key counts as often as the tokens that it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidtok.kernels import select
from vidtok.kernels.native.proportional_attention import proportional_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def with_mask(attend: Attend, q: Tensor, k: Tensor, v: Tensor, size: Tensor, mask: Tensor | None, scale: float) -> Any:
    """``attend`` with the log of the sizes added to its mask; ``[B, N]`` sizes, ``[B, H, N, D]`` keys."""
    bias = size.log().to(q.dtype)[:, None, None, :]
    if mask is None:
        return attend(q, k, v, bias, scale)
    if mask.dtype == torch.bool:
        return attend(q, k, v, bias.masked_fill(~mask, float("-inf")), scale)
    return attend(q, k, v, mask + bias, scale)


def with_channel(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, size: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    r"""``attend`` over :math:`q' = [q, 1]` and :math:`k' = [k, \log(size) / scale]`, which has the same scores.

    No mask is needed, so flash kernels stay usable. Heads are padded to a multiple of eight channels; in
    bf16 and fp16 the logarithm lies in two channels, the second with what the first rounds away.
    """
    d = q.shape[-1]
    log = size.log()[:, None, :, None] / scale
    high = log.to(k.dtype)
    parts = [high] if k.dtype == torch.float32 else [high, (log - high.float()).to(k.dtype)]
    pad = -(d + len(parts)) % 8
    parts = [part.expand(-1, k.shape[1], -1, 1) for part in parts]
    ones = q.new_ones(()).expand(*q.shape[:-1], len(parts))
    zeros = k.new_zeros(()).expand(*k.shape[:-1], pad)
    q = F.pad(torch.cat([q, ones], -1), (0, pad))
    k = torch.cat([k, *parts, zeros], -1)
    return attend(q, k, F.pad(v, (0, q.shape[-1] - d)), mask, scale)[..., :d]


FORMS = {"mask": with_mask, "channel": with_channel}


def choose(form: str, device: torch.device, flash: bool) -> str:
    """``mask`` or ``channel``: ``flash`` says that the attention function takes no additive mask."""
    if flash:
        return "channel"
    if form != "auto":
        return form
    return "mask" if device.type == "cpu" else "channel"


_FUSED = F.scaled_dot_product_attention
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _vectors() -> bool:
    return str(select.build_info().get("isa", "scalar")) != "scalar"


@functools.cache
def _amx() -> bool:
    # PyTorch's fused attention multiplies bf16 by AMX, which has not been measured against.
    check = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return check is not None and bool(check())


def _watched() -> bool:
    # Counters of operations, fake tensors, tracers, function transforms and forward gradients see PyTorch's operators
    # only, and so do those who put a function of their own in its place or turn its fused forms off.
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or F.scaled_dot_product_attention is not _FUSED
        or not torch.backends.cuda.flash_sdp_enabled()
    )


def _plain(t: Tensor) -> bool:
    """Whether the data of a tensor are what its type and strides say."""
    return type(t) is Tensor and t.device.type == "cpu" and not t.is_neg() and not t._is_zerotensor()


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the compiled kernel takes these, and is faster than PyTorch's fused attention.

    It takes ``[B, H, N, D]`` of one shape but for the queries' N on a CPU, a mask of keys ``[B or 1, 1, 1, M]`` to be
    added or none, and gives no gradients.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not select.state.native:
        return False
    if not (_plain(q) and _plain(k) and _plain(v)) or _watched():
        return False
    dtype = q.dtype
    return (
        dtype in _DTYPES
        and k.dtype == v.dtype == dtype
        and q.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[1], q.shape[3]) == (k.shape[0], k.shape[1], k.shape[3])
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and (mask is None or _of_keys(mask, k))
        # A row or two are not worth packing their keys.
        and (q.shape[2] > 2 or dtype != torch.float32)
        and (dtype == torch.get_autocast_dtype("cpu") or not torch.is_autocast_enabled("cpu"))
        and not (dtype == torch.bfloat16 and _amx())
        and select.holds("proportional_attention")
        and _vectors()
    )


def _of_keys(mask: Tensor, k: Tensor) -> bool:
    shape = mask.shape
    return (
        _plain(mask)
        and mask.dtype in (k.dtype, torch.float32)
        and mask.dim() == 4
        and shape[0] in (1, k.shape[0])
        and shape[1] == shape[2] == 1
        and shape[3] == k.shape[2]
    )


def compiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The compiled kernel, for what :func:`serves` says it does."""
    return proportional_attention(q, k, v, None if mask is None else mask[:, 0, 0].float(), scale)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's fused attention, ``[B, H, N, D]`` in and out."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The compiled kernel where it serves, PyTorch's fused attention elsewhere; ``[B, H, N, D]`` in and out."""
    return compiled(q, k, v, mask, scale) if serves(q, k, v, mask) else plain(q, k, v, mask, scale)
