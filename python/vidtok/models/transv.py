"""TransV: what leaves the decoder is passed to the text by gated cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vidtok import _check
from vidtok.models import scoring
from vidtok.models.attentions import find_attention
from vidtok.models.drop import ATTENTION, Drop, resolve_drop
from vidtok.models.layers import Layers
from vidtok.models.tokens import Tokens

# How far behind a drop to look for an attention layer whose sizes and weights to take.
_REACH = 20


class CrossAttention(nn.Module):
    r"""``text + tanh(alpha) · o(softmax(q(text) k(dropped)ᵀ / √D) v(dropped))``; no norm, no positions, not causal."""

    def __init__(self, channels: int, heads: int, kv_heads: int, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.q_proj = nn.Linear(channels, heads * dim, bias=bias)
        self.k_proj = nn.Linear(channels, kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(channels, kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, channels, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, text: Tensor, dropped: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, C]`` and ``[B, D, C]``, bool ``[B, D]`` (True for real tokens) to ``[B, T, C]``."""
        batch = text.shape[0]
        query = self.q_proj(text).view(batch, -1, self.heads, self.dim).transpose(1, 2)
        key, value = (
            proj(dropped).view(batch, -1, self.kv_heads, self.dim).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        some = mask.any(1)[:, None, None]
        seen = mask[:, None, None, :] | ~some[:, None]
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        out = self.o_proj(out.transpose(1, 2).reshape(batch, -1, self.heads * self.dim))
        return text + torch.where(some, torch.tanh(self.alpha).to(out.dtype) * out, 0.0).to(text.dtype)


class TransV(nn.Module):
    r"""One gated cross-attention for each stage of a :class:`~vidtok.Drop`.

    Where tokens leave, :math:`text' = text + \tanh(\alpha)\,\mathrm{CrossAttn}(Q=text, K=V=dropped)` for the
    text behind a row's last visual token; :math:`\alpha = 0` at first, so that nothing changes. It is
    no part of the model and not in its ``state_dict``: save its own, and give its parameters to the optimizer.

    Decoded tokens never read what was dropped, because it is gone by then. So answers do not either in
    training, unless ``answers`` is true; the published training lets them, and differs from its inference.
    (Generation without a cache takes decoded tokens for text, and so differs from generation with one.)

    Args:
        language_model: whose layers give sizes, dtype and device: the attention of the layer that tokens leave
            before, or of the nearest one behind it.
        drop: a spec or a :class:`~vidtok.Drop`.
        init: ``"attention"`` copies that layer's projections; None leaves random ones.
        answers: whether tokens with labels read dropped tokens too.

    Source: TimeViper (arXiv 2511.16595), section on TransV, from its formula.

    Example:
        >>> transv = TransV(model, "uni_7_0.5")  # doctest: +SKIP
        >>> vidtok.attach(model, decoder=vidtok.Drop("uni_7_0.5", merge=transv))  # doctest: +SKIP
    """

    def __init__(
        self, language_model: nn.Module, drop: str | Drop, *, init: str | None = None, answers: bool = False
    ) -> None:
        super().__init__()
        if init not in (None, "attention"):
            _check.fail("init to be None or 'attention'", repr(init))
        drop = resolve_drop(drop)
        layers = Layers(language_model)
        drop.validate(len(layers.modules), layers.kinds)
        self.answers = answers
        self.stages = nn.ModuleList(_stage(layers, entry, init) for entry in drop.entries)

    def text(self, tokens: Tokens, labels: Tensor | None = None) -> Tensor:
        """bool ``[B, L]``: the text that reads dropped tokens, among the columns that enter the decoder."""
        column = torch.arange(tokens.unit.shape[1], device=tokens.unit.device).expand(tokens.unit.shape)
        visual = torch.where(tokens.unit >= 0, column, -1).amax(1, keepdim=True)
        text = (column > visual) & (visual >= 0)
        if tokens.valid is not None:
            text = text & tokens.valid
        if labels is not None and not self.answers:
            text = text & (labels.to(text.device) == -100)
        return text

    def forward(self, stage: int, hidden: Tensor, dropped: Tensor, text: Tensor) -> Tensor:
        """Pass the columns that leave to the text.

        Args:
            stage: number of the drop.
            hidden: ``[B, L, C]`` before it.
            dropped: bool ``[B, L]``, the columns that leave.
            text: bool ``[B, L]``, the columns that read them.

        Returns:
            ``[B, L, C]``, changed at ``text`` only.
        """
        source, target = scoring.query_columns(dropped), scoring.query_columns(text)
        if source.shape[1] == 0 or target.shape[1] == 0:
            return hidden
        channels = hidden.shape[2]

        def take(columns: Tensor) -> Tensor:
            return hidden.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, channels))

        out = self.stages[stage](take(target), take(source), source >= 0)
        used = target >= 0
        row = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        at = (row * hidden.shape[1] + target)[used]
        return hidden.reshape(-1, channels).index_copy(0, at, out[used]).view(hidden.shape)


def _stage(layers: Layers, entry: int, init: str | None) -> CrossAttention:
    near = [i for i in range(entry, min(len(layers.modules), entry + _REACH + 1)) if layers.kinds[i] in ATTENTION]
    if not near:
        _check.fail(f"an attention layer among the {_REACH} from layer {entry} on", "none")
    found = find_attention(layers.modules[near[0]])
    module: Any = found.module
    own = module.k_proj if hasattr(module, "k_proj") else module.qkv_proj
    weight = next(own.parameters())
    channels = int(own.in_features)
    made = CrossAttention(channels, found.heads, found.kv_heads, found.dim, getattr(own, "bias", None) is not None)
    made.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else torch.get_default_dtype())
    if init is not None:
        if found.gated or not hasattr(module, "k_proj"):
            _check.fail("an attention with q_proj, k_proj and v_proj to copy", type(module).__name__)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        for name in names:
            theirs, ours = getattr(module, name), getattr(made, name)
            ours.load_state_dict(
                {key: value.detach().clone() for key, value in theirs.state_dict().items() if key in ours.state_dict()}
            )
    return made
