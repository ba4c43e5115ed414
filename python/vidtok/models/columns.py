"""Which columns of a batch are real tokens, in the prompt and in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.models import cache as caches
from vidtok.models.cache import State


def new_columns(mask: Any, batch: int, length: int, past: int, cache: Any, device: torch.device) -> Tensor | None:
    """bool ``[B, L]``, True for real tokens among the columns of this pass; None when all are.

    Args:
        mask: what the model was given: 2-D, or the 4-D mask or masks that ``generate`` makes for a static cache.
        past: columns that the cache holds already.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        new = mask[:, -length:].to(device).bool()
    elif isinstance(mask, Tensor) and mask.dim() == 4 and caches.is_static(cache):
        if past:
            return None
        last = mask[:, 0, -1, :length].expand(batch, length).to(device)
        new = last if last.dtype == torch.bool else last == 0
    else:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        _check.fail("an attention mask of shape [B, L], or none", str(shape))
    return None if bool(new.all()) else new


def past_columns(state: State | None, mask: Any, length: int, past: int, device: torch.device) -> Tensor | None:
    """bool ``[B, past]``, True for real tokens among the columns that the cache holds; None when all are."""
    if state is not None and state.reduced:
        return None if state.mask is None else state.mask[:, :past].to(device)
    if past and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + length:
        old = mask[:, :past].to(device).bool()
        return None if bool(old.all()) else old
    return None


def joined(
    old: Tensor | None, new: Tensor | None, batch: int, past: int, length: int, cache: Any, device: torch.device
) -> Tensor | None:
    """bool ``[B, past + L]`` for the columns after a pass; None when all are real.

    A static cache gets one of its full size, whose columns to come count as real: causality hides them,
    and the shape never changes.
    """
    size = caches.capacity(cache)
    if size is not None and past + length > size:
        _check.fail(f"at most {size} tokens in a static cache", str(past + length))
    if old is None and new is None:
        return None
    mask = torch.ones(batch, size or past + length, dtype=torch.bool, device=device)
    if old is not None:
        mask[:, :past] = old
    if new is not None:
        mask[:, past : past + length] = new
    return mask


def consecutive(mask: Tensor | None, batch: int, past: int, length: int, device: torch.device) -> Tensor:
    """int64 ``[B, L]``: numbers of the columns of this pass, counting real tokens only."""
    if mask is None:
        return torch.arange(past, past + length, device=device).expand(batch, length)
    return (mask[:, : past + length].long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
