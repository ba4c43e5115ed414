"""Attention in which a key counts as often as the tokens that it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


# Scores of a few heads at a time stay in a core's cache.
_SCORES = 1 << 18


@functools.cache
def _slow_bf16() -> bool:
    # PyTorch's fused attention multiplies bf16 by AMX; without it, plain products take less time.
    amx, own = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return own is not None and own() and not (amx is not None and amx())


def in_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether :func:`products` serves and is faster: bf16 on a CPU, a mask of keys, no gradients."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and mask.dtype == q.dtype
        and mask.shape == (q.shape[0], 1, 1, k.shape[2])
        and k.shape[1] == q.shape[1]
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and not torch.compiler.is_compiling()
        and _slow_bf16()
    )


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention as two products with a softmax between them, the first and the softmax in fp32."""
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    few = max(1, min(heads, _SCORES // max(1, rows * keys)))
    scores = q.new_empty(few, rows, keys, dtype=torch.float32)
    weights = torch.empty_like(scores, dtype=v.dtype)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    bias = mask[:, 0].float()
    # Where every key is hidden, fused attention gives zeros, a softmax NaN.
    hidden = bias.isneginf().all(-1).flatten().tolist()
    for i in range(batch):
        if hidden[i]:
            out[i].zero_()
            continue
        ask, keep = q[i].float(), k[i].float().transpose(1, 2)
        for h in range(0, heads, few):
            part = slice(0, min(few, heads - h))
            here = slice(h, h + part.stop)
            torch.baddbmm(bias[i], ask[here], keep[here], alpha=scale, out=scores[part])
            torch.softmax(scores[part], -1, out=scores[part])
            weights[part].copy_(scores[part])
            torch.bmm(weights[part], v[i, here], out=out[i, here])
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[B, H, N, D]`` in and out."""
    if mask is not None and in_products(q, k, v, mask):
        return products(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
