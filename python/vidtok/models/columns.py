"""Which columns of a batch are real tokens, in the prompt and in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check, ops
from vidtok.models import cache as caches
from vidtok.models.cache import State
from vidtok.plan import Plan

_WINDOWED = ("sliding", "chunked")


def new_columns(mask: Any, batch: int, length: int, past: int, cache: Any, device: torch.device) -> Tensor | None:
    """bool ``[B, L]``, True for real tokens among the columns of this pass; None when all are.

    Args:
        mask: what the model was given: 2-D, or the 4-D mask or masks that ``generate`` makes for a static cache.
        past: columns that the cache holds already.
    """
    if isinstance(mask, dict):
        kinds = sorted(mask, key=lambda kind: (kind != "full_attention", kind.startswith(_WINDOWED)))
        mask = mask[kinds[0]] if kinds else None
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        new = mask[:, -length:].to(device).bool()
    elif isinstance(mask, Tensor) and mask.dim() == 4 and caches.is_static(cache):
        if past:
            return None
        # A real token sees itself, whatever the window; the last row may see less than all of them.
        seen = mask[:, 0, :length, :length].diagonal(dim1=1, dim2=2)
        new = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, length).to(device)
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

    A decode step with a static cache gets one of its full size, whose columns to come count as real: causality
    hides them, and the shape never changes. Longer passes get no more than is filled, since recurrent layers read
    the last columns as theirs.
    """
    size = caches.capacity(cache)
    if size is not None and past + length > size:
        _check.fail(f"at most {size} tokens in a static cache", str(past + length))
    if old is None and new is None:
        return None
    whole = size if size is not None and length == 1 else past + length
    mask = torch.ones(batch, whole, dtype=torch.bool, device=device)
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


def gathered(mask: Any, rows: Plan, valid: Tensor, past: int, size: int | None = None) -> Any:
    """The masks of reduced rows, cut out of the 4-D mask, or masks by layer type, that the base model made.

    Args:
        mask: ``[B, 1, L, past + L]``, bool (True: seen) or added to scores; a dict of such; None: causal.
        rows: the plan of the rows.
        valid: bool ``[B, L']``, its real outputs.
        past: columns that the cache held before this pass.
        size: columns of a static cache, None of a growing one.
    """
    if isinstance(mask, dict):
        return {kind: gathered(value, rows, valid, past, size) for kind, value in mask.items()}
    batch, width = valid.shape
    if mask is None:
        if not rows.padded:
            return None
        causal = torch.ones(width, past + width, dtype=torch.bool, device=valid.device).tril(past)
        seen = torch.nn.functional.pad(valid, (past, 0), value=True)
        return causal & seen[:, None, None, :]
    if not (isinstance(mask, Tensor) and mask.dim() == 4):
        _check.fail("an attention mask of shape [B, 1, L, L], or none", type(mask).__name__)
    length = mask.shape[2]
    source = rows.anchor.long().view(batch, width).clamp(min=0) % length
    index = source[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    mask = mask.expand(batch, -1, -1, -1).gather(2, index)
    static = mask.shape[3] == size
    new = mask[..., past:].gather(3, source[:, None, None, :].expand(-1, mask.shape[1], width, -1))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    new = new.masked_fill(~valid[:, None, None, :], hidden)
    mask = torch.cat([mask[..., :past], new], -1)
    return torch.nn.functional.pad(mask, (0, size - mask.shape[3]), value=hidden) if static and size else mask


def shorten(labels: Tensor, rows: Plan, valid: Tensor | None) -> None:
    """Give labels ``[B, L]``, in place, the tokens of the reduced rows; ``valid`` bool ``[B, L']`` marks padding."""
    (short,) = ops.position_remap(rows, labels.to(rows.device), dim=-1, fill=-100)
    if valid is not None:
        # A padding column would predict the first real token, and only in rows that have one.
        first = valid & ~torch.nn.functional.pad(valid[:, :-1], (1, 0))
        short = short.masked_fill(first, -100)
    labels.resize_(short.shape).copy_(short)
