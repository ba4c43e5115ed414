"""Attention in which a key counts as often as the tokens that it stands for."""

from __future__ import annotations

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


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[B, H, N, D]`` in and out."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
