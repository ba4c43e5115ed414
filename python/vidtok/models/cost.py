r"""What a decoder layer costs: floating-point operations and bytes of its key/value cache.

For :math:`n` tokens of a row that find :math:`p` tokens in the cache:

.. math:: \text{FLOPs} = 2 n P + 4\, w \sum_{i=1}^{n} \min(p + i,\; s) + 6 n S

- :math:`P`: weights that a token meets: every matrix and convolution of the layer; of the routed experts of a
  mixture only the share :math:`k / E` that a token is sent to. A multiplication and an addition are two operations.
- :math:`w`: width of the attention output, heads × head dimension; the sum counts the causal pairs of query and key
  (:math:`Q K^T` and :math:`P V` take :math:`2w` each; where keys and values differ in width, :math:`2(w_k + w_v)`).
- :math:`s`: the sliding window of the layer, infinite without one.
- :math:`S`: elements of the recurrent state of a linear-attention or Mamba layer; each token decays the state, adds to
  it and reads it, two operations each.

Norms, activations, rotations and softmax are left out, and so are embeddings, the vision tower and the head, which
dropping inside the decoder does not change.

The cache holds :math:`\text{columns} \cdot (w_k + w_v) \cdot \text{bytes of the dtype}` per row, keys and values of
the key/value heads; a sliding-window layer holds :math:`\min(\text{columns}, s - 1)` of them after a prefill. Layers
without attention hold a state of fixed size, which no reduction changes and which is not counted, and layers that share
the cache of an earlier layer hold nothing. Of a kind of layer that is not named here (attention by an index), only
:math:`2 n P` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vidtok.models.layers import ATTENTION, Layers

_OUT = ("o_proj", "out_proj", "dense", "wo", "c_proj")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
_STATES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
)


@dataclass(frozen=True)
class LayerCost:
    """The numbers of one decoder layer that its cost depends on.

    Args:
        kind: as :class:`vidtok.models.layers.Layers` names it.
        weights: weights that a token meets (P).
        key_width: width of the queries, heads × head dimension; 0 without attention.
        value_width: width of the attention output; 0 without attention.
        kv_width: elements that the cache holds per column, keys and values together.
        window: sliding window, None without one.
        state: elements of the recurrent state (S).
        itemsize: bytes per element of the cache.
    """

    kind: str
    weights: int
    key_width: int = 0
    value_width: int = 0
    kv_width: int = 0
    window: int | None = None
    state: int = 0
    itemsize: int = 4

    def pairs(self, tokens: int, past: int = 0) -> int:
        """Causal pairs of query and key of one row."""
        if self.window is None:
            return tokens * past + tokens * (tokens + 1) // 2
        # The first queries see fewer keys than the window holds.
        growing = max(0, min(tokens, self.window - past))
        return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * self.window

    def flops(self, tokens: int, past: int = 0) -> int:
        """Operations for ``tokens`` of one row with ``past`` in the cache, by the formula of this module."""
        attention = 2 * (self.key_width + self.value_width) * self.pairs(tokens, past)
        return 2 * tokens * self.weights + attention + 6 * tokens * self.state

    def kv_columns(self, columns: int) -> int:
        """Columns that the cache holds after a prefill."""
        if not self.kv_width:
            return 0
        return columns if self.window is None else min(columns, self.window - 1)

    def kv_bytes(self, columns: int) -> int:
        """Bytes of keys and values of one row."""
        return self.kv_columns(columns) * self.kv_width * self.itemsize


def costs(language_model: nn.Module) -> list[LayerCost]:
    """The cost of each decoder layer, read from its modules, and from the config what no module says.

    Empty for a model without a list of decoder layers.
    """
    try:
        layers = Layers(language_model)
    except (ValueError, AttributeError):
        return []
    config = layers.config
    shared = len(layers.modules) - int(getattr(config, "num_kv_shared_layers", 0) or 0)
    return [_cost(m, kind, config, i >= shared) for i, (m, kind) in enumerate(zip(layers.modules, layers.kinds))]


def _cost(layer: nn.Module, kind: str, config: Any, shares: bool) -> LayerCost:
    weights, itemsize = _weights(layer, config)
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    if kind not in ATTENTION:
        state = _state(config) if kind == "linear_attention" else 0
        return LayerCost(kind, weights, state=state, itemsize=itemsize)
    key, value, kv = _widths(_attention(layer), config)
    return LayerCost(kind, weights, key, value, 0 if shares else kv, window, 0, itemsize)


def _weights(layer: nn.Module, config: Any) -> tuple[int, int]:
    """Weights that a token meets, and bytes per element of activations."""
    total, itemsize = 0.0, 0
    skipped = {id(m.weight) for m in layer.modules() if isinstance(m, nn.Embedding)}
    active = next((int(v) for v in (getattr(config, n, None) for n in _ACTIVE) if v), None)
    counts = {
        name: len(module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts"
    }
    for name, module in layer.named_modules():
        for short, weight in module.named_parameters(recurse=False):
            if weight.is_floating_point() and not itemsize:
                itemsize = weight.element_size()
            if weight.ndim < 2 or id(weight) in skipped:
                continue
            size: float = weight.numel()
            if short == "weight" and hasattr(module, "in_features") and hasattr(module, "out_features"):
                size = int(module.in_features) * int(module.out_features)  # a quantised weight is stored packed
            total += size * _share(name, weight.ndim, weight.shape[0], counts, active)
    return round(total), itemsize or 4


def _share(name: str, dims: int, first: int, counts: dict[str, int], active: int | None) -> float:
    """Share of the tokens that meet a weight: k / E for routed experts."""
    parts = name.split(".")
    if "experts" not in parts or active is None:
        return 1.0
    owner = ".".join(parts[: parts.index("experts") + 1])
    experts = counts.get(owner, first if dims == 3 else active)
    return min(1.0, active / experts)


def _attention(layer: nn.Module) -> Any:
    """The attention module of a layer."""
    for name in ("self_attn", "attention", "attn", "mixer", "self_attention"):
        module = getattr(layer, name, None)
        # A block may have a method of that name.
        if isinstance(module, nn.Module):
            return module
    return layer


def _widths(attention: Any, config: Any) -> tuple[int, int, int]:
    """Widths of queries and of the attention output, and elements cached per column."""
    heads = int(config.num_attention_heads)
    plain = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    key_dim = int(getattr(attention, "qk_head_dim", None) or plain)
    value_dim = int(getattr(attention, "v_head_dim", None) or plain)
    out = next((m for m in (getattr(attention, n, None) for n in _OUT) if hasattr(m, "in_features")), None)
    value = heads * value_dim if out is None else int(out.in_features)
    here = max(1, value // value_dim)
    groups = getattr(attention, "num_key_value_groups", None)
    if hasattr(attention, "expand_kv"):  # multi-head latent attention that caches the latents
        return here * key_dim, value, int(attention.kv_lora_rank) + int(attention.qk_rope_head_dim)
    kv_heads = here // int(groups) if groups else int(getattr(config, "num_key_value_heads", None) or here)
    return here * key_dim, value, kv_heads * (key_dim + value_dim)


def _state(config: Any) -> int:
    """Elements of the recurrent state; 0 where the config does not say, so that projections alone count."""
    for names in _STATES:
        a, b, c = (int(getattr(config, name, None) or 0) for name in names)
        if a * b * c:
            return a * b * c
    return 0
