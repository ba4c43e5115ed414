"""Attention that a few query rows pay to visual tokens, from one layer's own projections."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import ops
from vidtok.models.budgets import Groups, Kept, groups, keep_columns, keep_uniform
from vidtok.models.drop import Drop
from vidtok.models.tokens import Tokens

# Elements of the hidden states that are normalised and projected at once; bounds the memory of scoring.
CHUNK = 1 << 21
# What an attention may be made of; anything else could change queries or keys in an unknown way.
_PARTS = frozenset(
    {f"{x}_proj" for x in ("q", "k", "v", "o", "out", "qkv", "gate", "g")}
    | {f"{x}_norm" for x in ("q", "k", "v", "o", "qk")}
    | {"q_layernorm", "k_layernorm", "rotary_emb"}
)
_INPUT_NORMS = ("input_layernorm", "operator_norm", "attn_norm", "attention_norm", "norm", "ln_1")


# ---------------------------------------------------------------------- which rows ask
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
@dataclass(frozen=True)
class Attention:
    """How to make queries and keys of one layer's attention.

    Args:
        module: the attention module.
        norm: the layer's norm before it; None for layers without.
        heads: of the queries; ``kv_heads`` those of the keys, ``dim`` channels of each.
        gated: whether the query projection also makes a gate of as many channels per head.
        rotate: the model's own function for rotary positions; None for layers that have none.
    """

    module: Any
    norm: nn.Module | None
    heads: int
    kv_heads: int
    dim: int
    gated: bool
    rotate: Callable[..., Any] | None

    @property
    def scale(self) -> float:
        """What the layer multiplies logits by."""
        return float(getattr(self.module, "scaling", None) or self.dim**-0.5)

    def query(self, x: Tensor) -> Tensor:
        """``[B, W, C]`` to ``[B, W, H, D]``, before rotation."""
        fused = _fused(self.module)
        if fused is not None:
            out = fused(x)[..., : self.heads * self.dim]
        else:
            out = self.module.q_proj(x)
        if self.gated:
            out = out.view(*x.shape[:-1], self.heads, 2 * self.dim)[..., : self.dim]
            out = out.reshape(*x.shape[:-1], self.heads * self.dim)
        out = self._normed(out, "q", self.heads)
        factor = getattr(self.module, "qk_scale_factor", None)
        return out if factor is None else out * factor

    def key(self, x: Tensor) -> Tensor:
        """``[B, L, C]`` to ``[B, L, H, D]``, before rotation."""
        fused = _fused(self.module)
        if fused is not None:
            start = self.heads * self.dim
            out = fused(x)[..., start : start + self.kv_heads * self.dim]
        else:
            out = self.module.k_proj(x)
        return self._normed(out, "k", self.kv_heads)

    def _normed(self, x: Tensor, which: str, heads: int) -> Tensor:
        names = (f"{which}_norm", f"{which}_layernorm", "qk_norm")
        norm = next((n for n in names if getattr(self.module, n, None) is not None), None)
        shape = (*x.shape[:-1], heads, self.dim)
        if norm is None:
            return x.view(shape)
        module = getattr(self.module, norm)
        weight = getattr(module, "weight", None)
        whole = weight is not None and heads > 1 and weight.shape[-1] == heads * self.dim
        return module(x).view(shape) if whole else module(x.reshape(shape))

    def rotated(self, x: Tensor, position: Any) -> Tensor:
        """``[B, L, H, D]`` to ``[B, H, L, D]``, turned by (cos, sin) of the same columns when given."""
        x = x.transpose(1, 2)
        if position is None or self.rotate is None:
            return x
        cos, sin = position
        parameters = inspect.signature(self.rotate).parameters
        extra = {}
        if "mrope_section" in parameters:
            extra["mrope_section"] = _mrope_section(self.module)
        if "k" in parameters:
            # The rotation takes both; one head is enough to be thrown away.
            turned: Tensor = self.rotate(x, x[:, :1], cos, sin, **extra)[0]
        else:
            turned = self.rotate(x, cos, sin, **extra)
        return turned


def _fused(module: Any) -> Any:
    return getattr(module, "qkv_proj", None)


def _mrope_section(module: Any) -> Any:
    for owner in (module, getattr(module, "config", None)):
        for name in ("rope_parameters", "rope_scaling"):
            found = (getattr(owner, name, None) or {}).get("mrope_section")
            if found is not None:
                return found
    raise ValueError(f"expected {type(module).__name__} to know its mrope_section, got none")


def find_attention(layer: nn.Module) -> Attention:
    """The attention of a decoder layer.

    Raises:
        ValueError: when the layer has none, or one whose queries and keys are made in an unknown way.
    """
    found = [
        m
        for m in layer.children()
        if getattr(m, "k_proj", None) is not None or getattr(m, "qkv_proj", None) is not None
    ]
    mixed = [n for n, _ in layer.named_children() if "altup" in n or "hyper_connection" in n]
    if mixed:
        raise ValueError(
            f"expected a layer of one residual stream for attn, got {type(layer).__name__} with {mixed[0]}"
        )
    latent = None
    if not found:
        from vidtok.models.latent import find_latent

        latent = find_latent(layer, _input_norm)
    if latent is not None:
        return latent
    if len(found) != 1:
        raise ValueError(
            f"expected attention with q_proj and k_proj, or qkv_proj, for attn, got {type(layer).__name__}"
        )
    module: Any = found[0]
    config = getattr(module, "config", None)
    name = type(module).__name__
    if getattr(module, "attn_logit_softcapping", None):
        raise ValueError(f"expected attention without soft-capped logits for attn, got {name}")
    foreign = [
        child for child, m in module.named_children() if child not in _PARTS and any(True for _ in m.parameters())
    ]
    if foreign:
        raise ValueError(f"expected attention of known parts for attn, got {name} with {', '.join(foreign)}")
    dim = int(getattr(module, "head_dim", 0) or config.hidden_size // config.num_attention_heads)  # type: ignore[union-attr]
    fused, output = _fused(module), getattr(module, "o_proj", None)
    if fused is not None:
        heads = int(getattr(module, "num_heads", 0) or config.num_attention_heads)  # type: ignore[union-attr]
        kv_heads = (int(fused.out_features) // dim - heads) // 2
        gated = False
    else:
        made = int(module.q_proj.out_features) // dim
        heads = int(output.in_features) // dim if output is not None else made
        kv_heads = int(module.k_proj.out_features) // dim
        gated = made == 2 * heads
        if made not in (heads, 2 * heads):
            raise ValueError(f"expected q_proj of {heads} heads, got {made} in {name}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"expected a multiple of {kv_heads} key heads, got {heads} in {name}")
    return Attention(module, _input_norm(layer), heads, kv_heads, dim, gated, _rotation(module))


def _input_norm(layer: nn.Module) -> nn.Module | None:
    for name in _INPUT_NORMS:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    if hasattr(layer, "post_feedforward_layernorm"):  # normed after attention and MLP only
        return None
    known = ", ".join(name for name, _ in layer.named_children())
    raise ValueError(f"expected {type(layer).__name__} to have an input norm, got {known}")


# Families of transformers some of whose layers have no positions, and which ones these are.
_UNROTATED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("exaone4", "exaone4_5", "exaone_moe", "kolibri1"), lambda m: m.sliding_window and not m.is_sliding
    ),
    **dict.fromkeys(("cohere2", "cohere2_moe", "flint"), lambda m: not m.sliding_window),
    "afmoe": lambda m: not m.is_local_attention,
}


def _rotation(module: Any) -> Callable[..., Any] | None:
    """The function by which the attention's own forward rotates, None when it does not."""
    if getattr(module, "use_rope", True) in (False, 0):
        return None
    rule = _UNROTATED.get(type(module).__module__.split(".")[-2])
    if rule is not None and rule(module):
        return None
    forward = inspect.unwrap(type(module).forward)
    names = [n for n in forward.__code__.co_names if n.startswith("apply_") and "rot" in n]
    for name in names:
        function = getattr(sys.modules[type(module).__module__], name, None)
        if callable(function):
            return function  # type: ignore[no-any-return]
    return None


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
    with _quiet(layer, hidden.device):
        hidden = hidden.detach()
        at = columns.clamp(min=0)
        asked = hidden.gather(1, at[..., None].expand(-1, -1, channels))
        asked = asked if norm is None else norm(asked)
        query = attention.rotated(attention.query(asked), _at(turned, at, batch))
        step = max(64, CHUNK // max(1, batch * channels))
        key: Tensor | None = None
        for start in range(0, length, step):
            part = hidden[:, start : start + step]
            part = part if norm is None else norm(part)
            made = attention.rotated(attention.key(part), _at(turned, slice(start, start + step), batch))
            if key is None:
                key = made.new_empty(batch, attention.kv_heads, length, attention.dim)
            key[:, :, start : start + step] = made
        assert key is not None
    return query.to(key.dtype), key, attention.scale


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
        mask=valid,
        query_position=columns,
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
