"""How a decoder layer makes its queries and keys: its own norm, projections and rotation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# What an attention may be made of; anything else could change queries or keys in an unknown way.
_PARTS = frozenset(
    {f"{x}_proj" for x in ("q", "k", "v", "o", "out", "qkv", "gate", "g")}
    | {f"{x}_norm" for x in ("q", "k", "v", "o", "qk")}
    | {"q_layernorm", "k_layernorm", "rotary_emb"}
)
_INPUT_NORMS = ("input_layernorm", "operator_norm", "attn_norm", "attention_norm", "norm", "ln_1")


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
