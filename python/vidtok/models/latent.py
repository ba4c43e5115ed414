"""Queries and keys of attention whose keys are made from a latent of few channels, as DeepSeek-V3's are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.models.attentions import Attention

_PARTS = frozenset(
    ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
)


@dataclass(frozen=True)
class Latent(Attention):
    """Heads of a part without positions and a part that is turned, which all keys of a token share."""

    def query(self, x: Tensor) -> Tensor:
        """``[B, W, C]`` to ``[B, W, H, D]``, before rotation."""
        m = self.module
        out = m.q_proj(x) if m.q_lora_rank is None else m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x)))
        return out.view(*x.shape[:-1], self.heads, self.dim)

    def key(self, x: Tensor) -> Tensor:
        """``[B, L, C]`` to ``[B, L, H, D]``, before rotation."""
        m = self.module
        latent, turned = m.kv_a_proj_with_mqa(x).split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        made = m.kv_b_proj(m.kv_a_layernorm(latent)).view(*x.shape[:-1], self.heads, -1)
        return torch.cat([made[..., : m.qk_nope_head_dim], turned[..., None, :].expand(*made.shape[:-1], -1)], -1)

    def rotated(self, x: Tensor, position: Any) -> Tensor:
        """``[B, L, H, D]`` to ``[B, H, L, D]``, the last channels turned by (cos, sin) of these columns when given."""
        x = x.transpose(1, 2)
        if position is None or self.rotate is None:
            return x
        still, turning = x.split([self.module.qk_nope_head_dim, self.module.qk_rope_head_dim], -1)
        return torch.cat([still, self.rotate(turning, turning[:, :1], *position)[0]], -1)


def find_latent(layer: nn.Module, norm: Callable[[nn.Module], nn.Module | None]) -> Latent | None:
    """Such an attention of a decoder layer; None for a layer without, or with one of more parts.

    Args:
        norm: finds the norm before the attention.
    """
    found: list[Any] = [m for m in layer.children() if getattr(m, "kv_a_proj_with_mqa", None) is not None]
    if len(found) != 1:
        return None
    module = found[0]
    if any(name not in _PARTS for name, child in module.named_children() if any(True for _ in child.parameters())):
        return None
    # Families that scale their latents, or turn them in another way, are not taken.
    source = sys.modules[type(module).__module__]
    name = "apply_rotary_pos_emb_interleave" if getattr(module.config, "rope_interleave", False) else None
    rotate = getattr(source, name or "apply_rotary_pos_emb", None)
    if rotate is None or hasattr(module, "q_lora_scale") or hasattr(module, "kv_lora_scale"):
        return None
    heads = int(module.num_heads)
    return Latent(module, norm(layer), heads, heads, int(module.qk_head_dim), False, rotate)
