"""Attention masks of towers, which follow the tokens while these merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.merge.run import Step


def real(x: Tensor, mask: Any) -> Tensor | None:
    """bool ``[B, T]``, the tokens of ``x`` ``[B, T, C]`` that a mask lets others see; None without a mask of keys.

    Args:
        x: what enters the first block.
        mask: what the tower hands to its blocks: ``[B, T]``, or ``[B, 1, T, T]``, bool or added to the scores.

    Raises:
        ValueError: for a mask that is not the same for all queries, whose merged tokens would have none.
    """
    if not isinstance(mask, Tensor) or mask.shape[-1] != x.shape[1]:
        return None
    if mask.dim() == 4:
        if not torch.compiler.is_compiling() and not torch.equal(mask, mask[:, :1, :1].expand_as(mask)):
            raise ValueError("expected an attention mask that hides padding from all queries, got one of single pairs")
        mask = mask[:, 0, 0]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return mask.bool().expand(x.shape[:2])


def follow(step: Step, mask: Any) -> Any:
    """A mask of the tokens at the tower's entry, for those that are there now."""
    place = step.place
    if place is None or not isinstance(mask, Tensor) or mask.shape[-1] != step.run.tokens[0]:
        return mask
    return gather(mask, place)


def gather(mask: Tensor, place: Tensor) -> Tensor:
    """The entries ``place`` ``[B, T']`` of a mask ``[B, T]`` or ``[B, 1, T, T]`` of keys."""
    if mask.dim() == 2:
        return mask.expand(place.shape[0], -1).gather(1, place)
    return mask[:, :1, :1].expand(place.shape[0], -1, -1, -1).gather(-1, place[:, None, None])
