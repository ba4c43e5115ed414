"""Calls in which dropping tokens would silently change something else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.models.call import Call
from vidtok.models.families import Visual


def refuse_columns(call: Call) -> None:
    """Raise for calls that name columns which may be gone."""
    if isinstance(call.logits_to_keep, Tensor):
        _check.fail("logits_to_keep as a number, because tokens are dropped", "a tensor")
    if call.router_loss:
        raise ValueError(
            "expected output_router_logits=False or no attention_mask, because the load-balancing loss masks tokens "
            "that were dropped, got both"
        )


def routes(module: Any, arguments: dict[str, Any]) -> bool:
    """Whether a mixture of experts computes the loss of its routers."""
    asked = arguments.get("output_router_logits")
    config = module.config.get_text_config()
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def refuse(arguments: dict[str, Any], call: Call, length: int, mrope: bool) -> None:
    """Raise for calls in which dropping tokens would silently change something else."""
    refuse_columns(call)
    position = arguments.get("position_ids")
    refuse_length(position, length)
    if not mrope:
        return
    if position is None or position.dim() == 2 or _is_text(position, call.visual):
        raise ValueError(
            "expected M-RoPE positions for the visual tokens, got 1-D text positions; "
            "pass the processor's mm_token_type_ids, or position_ids of shape [3, B, L]"
        )


def _is_text(position: Tensor, visual: Visual | None) -> bool:
    """Whether visual tokens got 1-D positions: height and width ids of a real grid differ somewhere."""
    if visual is None or all(h * w < 2 for _, h, w in (unit.grid_thw for unit in visual.units)):
        return False
    at = visual.columns.to(position.device)
    at = at % position.shape[-1] if position.shape[1] == 1 else at
    height, width = position[-2:].flatten(1)[:, at]
    return torch.equal(height, width)


def refuse_length(position: Tensor | None, length: int) -> None:
    """Raise for positions of another number of columns."""
    if position is not None and position.shape[-1] != length:
        _check.fail(
            f"position_ids for the {length} tokens of this pass",
            f"{position.shape[-1]} (give it no attention_mask of the whole sequence without position_ids)",
        )
