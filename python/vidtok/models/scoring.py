"""Attention that a few query rows pay to visual tokens, from one layer's own projections."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import ops
from vidtok.models.attentions import find_attention
from vidtok.models.budgets import Groups, Kept, groups, keep_columns, keep_uniform
from vidtok.models.drop import Drop
from vidtok.models.tokens import Tokens

# Elements of the hidden states that are normalised and projected at once; bounds the memory of scoring.
CHUNK = 1 << 21


# ---------------------------------------------------------------------- which rows ask
def ends(tokens: Tokens) -> Tensor:
    """bool ``[B, L]``: the last real token of each row."""
    valid = torch.ones_like(tokens.unit, dtype=torch.bool) if tokens.valid is None else tokens.valid
    return _last(valid, torch.arange(valid.shape[1], device=valid.device).expand(valid.shape))


def queries(drop: Drop, tokens: Tokens, labels: Tensor | None = None) -> Tensor:
    """bool ``[B, L]``: the rows whose attention decides, found when the decoder is entered.

    They are text and so stay; the mask has to be gathered like the other columns at each drop.

    Args:
        tokens: of the columns that enter the decoder.
        labels: ``[B, L]``, −100 for prompt tokens; None at inference.
    """
    unit = tokens.unit
    valid = torch.ones_like(unit, dtype=torch.bool) if tokens.valid is None else tokens.valid
    column = torch.arange(unit.shape[1], device=unit.device).expand(unit.shape)
    prompt = valid
    turns = torch.zeros_like(valid)
    if labels is not None:
        answer = (labels.to(unit.device) != -100) & valid
        turns[:, :-1] = valid[:, :-1] & ~answer[:, :-1] & answer[:, 1:]
        prompt = valid & ~answer
        last_turn = torch.where(turns, column, -1).amax(1, keepdim=True)
        before = (column <= last_turn) | (last_turn < 0)
    else:
        before = torch.ones_like(valid)
    last = _last(valid & before, column)
    if drop.query == "turns":
        return torch.where(turns.any(1, keepdim=True), turns, last)
    if drop.query == "question":
        visual = torch.where(unit >= 0, column, -1).amax(1, keepdim=True)
        question = prompt & before & (column > visual)
        return torch.where(question.any(1, keepdim=True), question, last)
    return last


def _last(mask: Tensor, column: Tensor) -> Tensor:
    at = torch.where(mask, column, -1).amax(1, keepdim=True)
    return (column == at) & mask


def query_columns(asking: Tensor) -> Tensor:
    """int64 ``[B, W]``: columns of the asking rows of each sample, −1 where it has fewer than W."""
    count = asking.sum(1)
    width = int(count.max()) if asking.numel() else 0
    order = torch.argsort((~asking).to(torch.int8), dim=1, stable=True)[:, :width]
    used = torch.arange(width, device=asking.device) < count[:, None]
    return torch.where(used, order, -1)


# ---------------------------------------------------------------------- queries and keys of a layer
@contextlib.contextmanager
def _quiet(module: nn.Module, device: torch.device) -> Iterator[None]:
    """No gradient, no dropout (of adapters), and no cast weights left in autocast's cache without their gradient."""
    training = [m for m in module.modules() if m.training]
    autocast: Any = contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type):
        autocast = torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
    try:
        for m in training:
            m.training = False
        with torch.no_grad(), autocast:
            yield
    finally:
        for m in training:
            m.training = True


def _at(position: Any, index: slice | Tensor, batch: int) -> Any:
    """(cos, sin) of some columns; these tensors are ``[..., B or 1, L, D]``."""
    if position is None:
        return None
    if not (isinstance(position, (tuple, list)) and len(position) == 2):
        raise ValueError(f"expected position_embeddings as (cos, sin), got {type(position).__name__}")
    out = []
    for x in position:
        if isinstance(index, slice):
            out.append(x[..., index, :])
        else:
            wide = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
            out.append(torch.gather(wide, -2, index[..., None].expand(*wide.shape[:-2], index.shape[-1], x.shape[-1])))
    return tuple(out)


def positions_of(layer: nn.Module, arguments: dict[str, Any]) -> Any:
    """(cos, sin) among the arguments of a layer's call; None when it gets none."""
    if "position_embeddings_local" not in arguments:
        return arguments.get("position_embeddings")
    # transformers 4 hands both kinds to every layer of Gemma 3.
    sliding = bool(getattr(getattr(layer, "self_attn", None), "is_sliding", False))
    return arguments["position_embeddings_local" if sliding else "position_embeddings_global"]


def positions_in(position: Any, part: slice) -> Any:
    """(cos, sin) of neighbouring columns."""
    return tuple(x[..., part, :] for x in position) if isinstance(position, (tuple, list)) else position


def query_and_key(
    drop: Drop, layer: nn.Module, hidden: Tensor, position_embeddings: Any, columns: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Queries of some rows, keys of all, and the scale of a layer that is about to run on ``hidden``.

    Only these rows of q are projected; keys are made a piece at a time.

    Args:
        hidden: ``[B, L, C]``, the layer's input.
        position_embeddings: (cos, sin) that the layer gets for these columns; None without.
        columns: int64 ``[B, W]``; −1 for none.

    Returns:
        ``[B, H, W, D]``, ``[B, Hkv, L, D]`` and the scale.
    """
    attention = find_attention(layer)
    batch, length, channels = hidden.shape
    norm = attention.norm if drop.norm else None
    turned = position_embeddings if drop.rope else None
    if drop.rope and turned is None and attention.rotate is not None:
        given = inspect.signature(inspect.unwrap(type(attention.module).forward)).parameters
        if "position_embeddings" not in given:  # a layer without positions is given None
            name = type(attention.module).__name__
            raise ValueError(f"expected attention that is given its rotation for rope=True, got {name}")
    # accelerate moves a layer's input after the hooks of this package.
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    device = hidden.device if device is None else torch.device(device)
    with _quiet(layer, device):
        hidden = hidden.detach()
        if turned is not None:
            turned = tuple(x.to(device) for x in turned)
        at = columns.clamp(min=0)
        asked = hidden.gather(1, at[..., None].expand(-1, -1, channels)).to(device)
        at = at.to(device)
        asked = asked if norm is None else norm(asked)
        query = attention.rotated(attention.query(asked), _at(turned, at, batch))
        step = max(64, CHUNK // max(1, batch * channels))
        key: Tensor | None = None
        for start in range(0, length, step):
            part = hidden[:, start : start + step].to(device)
            part = part if norm is None else norm(part)
            made = attention.rotated(attention.key(part), _at(turned, slice(start, start + step), batch))
            if key is None:
                key = made.new_empty(batch, attention.kv_heads, length, attention.dim)
            key[:, :, start : start + step] = made
        assert key is not None
    return query.to(key), key, attention.scale


# ---------------------------------------------------------------------- selection
def importance(
    drop: Drop,
    layer: nn.Module,
    hidden: Tensor,
    position_embeddings: Any,
    chosen: Groups,
    valid: Tensor | None,
    asking: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""The best tokens of each budget by the attention of the asking rows.

    :math:`s_l = \mathrm{reduce}_{h,w}\ \mathrm{softmax}_{l'}(q_{h,w} \cdot k_{l'} / \sqrt{D})_l` over the
    columns at or before row w, on the layer's own projections of ``hidden``.

    Args:
        layer: whose attention scores; ``hidden`` ``[B, L, C]`` is its input.
        position_embeddings: (cos, sin) of these columns, for ``rope=True``.
        chosen: the budgets present.
        valid: bool ``[B, L]``, False for padding; None when all columns are real.
        asking: bool ``[B, L]`` of :func:`queries`, gathered to these columns.

    Returns:
        Packed row columns that stay, budget by budget, and the fp32 score of every visual token in the
        order of ``chosen.span``.
    """
    columns = query_columns(asking)
    query, key, scale = query_and_key(drop, layer, hidden, position_embeddings, columns)
    found = ops.attention_topk(
        query,
        key,
        chosen.keep,
        span=chosen.span,
        group=chosen.group,
        scale=scale,
        mask=None if valid is None else valid.to(key.device),
        query_position=columns.to(key.device),
        reduce="max" if drop.reduce == "max" else "mean",
    )
    row = torch.repeat_interleave(torch.tensor(chosen.row), torch.tensor(chosen.keep)).to(found.index.device)
    return row * hidden.shape[1] + found.index, found.score


def select(
    drop: Drop,
    stage: int,
    key: Tensor,
    original: dict[int, int],
    *,
    layer: nn.Module | None = None,
    hidden: Tensor | None = None,
    position_embeddings: Any = None,
    valid: Tensor | None = None,
    asking: Tensor | None = None,
) -> Kept:
    """Which columns stay at a stage.

    Args:
        stage: its number.
        key: ``[B, L]`` of :func:`vidtok.models.budgets.keys`, gathered to the columns present.
        original: of :func:`vidtok.models.budgets.originals`.
        layer: for ``attn``, the layer ``drop.scorers[stage]``; ``hidden`` ``[B, L, C]`` is its input,
            ``position_embeddings``, ``valid`` and ``asking`` belong to the same columns.
    """
    chosen = groups(drop, stage, key, original)
    if drop.stages[stage].kind == "uni" or not chosen.key or chosen.keep == chosen.current:
        return keep_uniform(chosen, key)
    assert layer is not None and hidden is not None and asking is not None
    columns, _ = importance(drop, layer, hidden, position_embeddings, chosen, valid, asking)
    return keep_columns(chosen, key, columns.to(key.device))
