"""Attention masks for the layers behind a drop, sized by what those layers themselves hold."""

from __future__ import annotations

import inspect
from functools import cache as memo
from typing import Any

import torch
from torch import Tensor


class _Layer:
    """What mask functions ask of a cache, answered for one layer in every version."""

    is_initialized = True

    def __init__(self, kind: str, layer: Any) -> None:
        self.is_sliding = [kind in ("sliding_attention", "chunked_attention")]
        self.is_linear = self.is_dummy = [False]
        self.is_compileable = getattr(layer, "is_compileable", False)
        self.layer = layer

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns that the layer was fed."""
        return self.layer.get_seq_length()

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> Any:
        """Keys that the layer's attention will see, and the number of the first; ``query`` as the version has it."""
        return self.layer.get_mask_sizes(query)


@memo
def _function(kind: str) -> tuple[Any, frozenset[str]]:
    from transformers import masking_utils

    name = {
        "full_attention": "create_causal_mask",
        "indexed_attention": "create_causal_mask",
        "sliding_attention": "create_sliding_window_causal_mask",
        "chunked_attention": "create_chunked_causal_mask",
    }[kind]
    function = getattr(masking_utils, name)
    return function, frozenset(inspect.signature(function).parameters)


def build(
    config: Any, kind: str, hidden: Tensor, mask: Tensor | None, past: int, layer: Any, packed: Tensor | None = None
) -> Any:
    """The mask that transformers makes for a layer of this kind.

    Args:
        config: of the language model; tells the attention implementation and the window.
        kind: of the layer; ``local``: the real columns of this pass, whatever the layer does with them.
        hidden: ``[B, L, C]``, what enters the layer.
        mask: bool ``[B, past + L]``, True for real tokens among what the layer was fed; None when all are.
        past: columns that the layer was fed before this pass.
        layer: the layer's part of the cache; None without one.
        packed: position ids ``[B, L]`` that restart at every packed sequence; None for padded rows.

    Returns:
        What the attention implementation takes: a 4-D or 2-D tensor, or None.
    """
    length = hidden.shape[1]
    if kind == "none":
        return None
    if kind == "linear_attention":
        if mask is None or length == 1:
            return None
        return mask[:, past : past + length].contiguous()
    if kind == "local":
        if mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return mask[:, past : past + length].contiguous()
    function, names = _function(kind)
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds" if "inputs_embeds" in names else "input_embeds": hidden,
        "attention_mask": mask,
        "past_key_values": None if layer is None else _Layer(kind, layer),
        "position_ids": packed,
    }
    if kind == "indexed_attention":
        # The index reads the mask itself.
        arguments["allow_is_causal_skip"] = False
    if "cache_position" in names:
        arguments["cache_position"] = torch.arange(past, past + length, device=hidden.device)
    return function(**arguments)


def allowed(mask: Tensor) -> Tensor:
    """bool: where a 4-D mask lets attention through."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def same(made: Tensor, given: Tensor, real: Tensor | None) -> bool:
    """Whether two 4-D masks let the same attention through, in the rows of real tokens (bool ``[B, L]``)."""
    if made.shape[-2:] != given.shape[-2:]:
        return False
    differs = (allowed(made) != allowed(given)).any(-1).any(1)
    return not bool((differs if real is None else differs & real).any())


def first_new(kind: str, past: int, width: int, length: int, static: bool) -> int:
    """Where the keys of a pass of ``length`` tokens begin in a mask over ``width`` keys."""
    if not static:
        return width - length
    if past and kind != "full_attention":
        raise ValueError(
            "expected a cache that grows for a later turn with frames that see each other, got a static one"
        )
    return past


def blocks(mask: Tensor, length: int, first: int) -> Tensor | None:
    """bool ``[B, L, L]``: pairs of the ``length`` new tokens that see each other both ways, as some families' frames.

    Args:
        mask: the 4-D mask that the family made.
        first: of :func:`first_new`.
    """
    new = allowed(mask)[:, 0, -length:, first : first + length]
    later = new.triu(1)
    return (later | later.transpose(1, 2)) if bool(later.any()) else None


@memo
def by_layer() -> bool:
    """Whether caches count per layer, so that static ones may differ in length."""
    return "cache_position" not in _function("full_attention")[1]


def with_blocks(mask: Tensor | None, pairs: Tensor | None, hidden: Tensor, past: int, first: int | None) -> Tensor:
    """A mask in full, with the pairs let through as well.

    Args:
        mask: 4-D; None for a causal one.
        pairs: of :func:`blocks`.
        first: of :func:`first_new`; None where it follows from the mask.
    """
    batch, length = hidden.shape[:2]
    if mask is None:
        row = torch.arange(length, device=hidden.device)[:, None] + past
        mask = (torch.arange(past + length, device=hidden.device) <= row).expand(batch, 1, -1, -1)
    if pairs is None:
        return mask
    out = mask.expand(batch, *mask.shape[1:]).clone()
    first = out.shape[-1] - length if first is None else first
    new = out[..., first : first + length]
    if out.dtype == torch.bool:
        new |= pairs[:, None]
    else:
        new.masked_fill_(pairs[:, None], 0)
    return out
