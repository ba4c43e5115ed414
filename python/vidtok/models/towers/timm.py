"""timm's VisionTransformer and Eva, which are known by name: timm itself is not needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge.attention import compiled, serves
from vidtok.merge.run import Step, weighted_mean
from vidtok.models.towers._base import Tower
from vidtok.models.towers._heads import sizes
from vidtok.models.towers._masks import follow, real
from vidtok.models.towers._override import override

# Norms before the halves, and at their ends.
_BEFORE, _AFTER = ("Block", "EvaBlock"), ("ResPostBlock", "EvaBlockPostNorm")
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, T, D]`` of normalised tokens."""
    if getattr(attn, "qkv", None) is None:
        q, k, v = (
            part(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        return q, k, v
    bias = getattr(attn, "q_bias", None)
    if bias is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    q, k, v = qkv.reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """``[B, H, T, D]`` with the channels after ``prefix`` tokens rotated; ``rope`` holds sines and cosines."""
    sin, cos = rope.chunk(2, -1)
    patches = x[:, :, prefix:]
    if half:
        turned = torch.cat([-patches[..., patches.shape[-1] // 2 :], patches[..., : patches.shape[-1] // 2]], -1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).reshape(patches.shape)
    return torch.cat([x[:, :, :prefix], patches * cos + turned * sin], 2)


def placed(rope: Tensor, place: Tensor) -> Tensor:
    """What rotates the tokens at ``place`` ``[B, T']``, as ``[B, 1 or H, T', D]``."""
    if rope.dim() == 2:
        return rope[place].unsqueeze(1)
    if rope.dim() == 3:
        return rope[:, place].transpose(0, 1)
    index = place[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
    return rope.expand(place.shape[0], -1, -1, -1).gather(2, index)


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, step: Step, dropout: float, width: int
) -> Tensor:
    """Fused attention as libraries call it: they leave the scale of ``width`` channels to PyTorch, which rounds it."""
    if step.free and dropout == 0 and serves(q, k, v, mask):
        return compiled(q, k, v, mask, scale)
    own = None if q.shape[-1] == width else scale
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=own)


def attention(attn: Any, x: Tensor, step: Step, mask: Any = None, is_causal: bool = False, rope: Any = None) -> Tensor:
    """timm's attention modules, whose keys weigh by size."""
    if is_causal:
        raise ValueError("expected attention without is_causal where tokens merge, got is_causal=True")
    gate = getattr(attn, "gate", None)
    gated = None if gate is None else gate(x).sigmoid()
    q, k, v = heads(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
        if step.place is not None:
            rope = placed(rope, step.place[:, prefix:] - prefix)
        q, k = rotated(q, rope, prefix, half).type_as(v), rotated(k, rope, prefix, half).type_as(v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if attn.fused_attn:
            dropout = attn.attn_drop.p if attn.training else 0.0
            return fused(q, k, v, mask, scale, step=step, dropout=dropout, width=attn.head_dim)
        weight = (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            weight = weight.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else weight + mask
        return attn.attn_drop(weight.softmax(-1)) @ v

    out = step.attention(q, k, v, mask=follow(step, mask), scale=attn.scale, attend=attend)
    out = out.transpose(1, 2).flatten(2)
    norm = getattr(attn, "norm", None)
    out = out if norm is None else norm(out)
    return attn.proj_drop(attn.proj(out if gated is None else out * gated))


class TimmBlock:
    """Pre-norm blocks, post-norm blocks and their EVA kinds, whose layer scale is a parameter."""

    def real(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        mask = kwargs.get("attn_mask", next((a for a in args if isinstance(a, Tensor) and a.dim() == 4), None))
        if mask is not None and mask.dim() != 4:
            raise ValueError(f"expected attn_mask [B, 1, 1, T] where tokens merge, got {list(mask.shape)}")
        return real(x, mask)

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Tensor:
        names = (
            ("rope", "attn_mask", "is_causal")
            if hasattr(block.attn, "num_prefix_tokens")
            else ("attn_mask", "is_causal")
        )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask, causal, rope = given.get("attn_mask"), given.get("is_causal", False), given.get("rope")
        if type(block).__name__ in _AFTER:
            return x + block.drop_path1(block.norm1(attention(block.attn, x, step, mask, causal, rope)))
        out = attention(block.attn, block.norm1(x), step, mask, causal, rope)
        return x + block.drop_path1(_scaled(block, 1, out))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        if type(block).__name__ in _AFTER:
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))


class EvaBlock(TimmBlock):
    """Blocks that may rotate queries and keys; a merged token is rotated as its destination is."""

    follow = True


def _scaled(block: Any, half: int, x: Tensor) -> Tensor:
    if hasattr(block, f"ls{half}"):
        return getattr(block, f"ls{half}")(x)
    gamma = getattr(block, f"gamma_{half}")
    return x if gamma is None else gamma * x


def _fits(tower: Any, merging: Any) -> Callable[[], None]:
    """Refuse blocks that merge nowhere, or whose attention is another one."""
    for block in tower.blocks:
        if type(block).__name__ not in _BEFORE + _AFTER:
            raise ValueError(
                f"expected blocks of a supported class ({', '.join(_BEFORE + _AFTER)}), got {type(block).__name__}"
            )
        if type(block.attn).__name__ not in _ATTENTIONS:
            raise ValueError(
                f"expected attention of a supported class ({', '.join(_ATTENTIONS)}), got {type(block.attn).__name__}"
            )
    return lambda: None


def _pool(tower: Any, merging: Any) -> Callable[[], None]:
    """Weigh by size what the head pools, or give every token to a head that cannot."""
    head = getattr(tower, "attn_pool", None)
    if head is not None and (type(head).__name__ != "AttentionPoolLatent" or head.pos_embed is not None):
        merging.full_length = True

    def pool(tower: Any, own: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        size = sizes(merging)
        if size is None or tuple(size.shape) != tuple(x.shape[:2]):
            return own(x, pool_type)
        skip = 0 if getattr(tower, "pool_include_prefix", False) else tower.num_prefix_tokens
        if head is not None:
            # Eva's own pool hands its prefix over as well.
            skip = skip if hasattr(tower, "pool_include_prefix") else 0
            bias = size[:, skip:].log().to(x.dtype)[:, None, None]
            return tower.attn_pool(x[:, skip:], attn_mask=bias)
        kind = tower.global_pool if pool_type is None else pool_type
        if kind == "avg":
            return weighted_mean(x, size, skip)
        if kind == "avgmax":
            return 0.5 * (x[:, skip:].amax(1) + weighted_mean(x, size, skip))
        return own(x, pool_type)

    return override(tower, pool=pool, forward_intermediates=maps(merging))


def maps(merging: Any) -> Callable[..., Any]:
    """Name what is wrong where feature maps are asked for, which need every token of every block."""

    def forward_intermediates(tower: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs)
        given.apply_defaults()
        wrong = "expected forward_intermediates(output_fmt='NLC') where tokens merge, got 'NCHW', maps of all of them"
        try:
            out = own(*args, **kwargs)
        except RuntimeError as error:
            raise ValueError(wrong) if sizes(merging) is not None else error from None
        if given.arguments["output_fmt"] == "NCHW" and sizes(merging) is not None:
            raise ValueError(wrong)
        return out

    return forward_intermediates


def _prefix(tower: Any) -> int:
    return tower.num_prefix_tokens


def _none(block: nn.Module) -> list[nn.Module]:
    return []


_EXTRAS = (_fits, _pool)

FAMILIES = (
    Tower("timm", ("VisionTransformer",), ("blocks",), TimmBlock(), _none, _prefix, extras=_EXTRAS, package="timm"),
    Tower("timm_eva", ("Eva",), ("blocks",), EvaBlock(), _none, _prefix, extras=_EXTRAS, package="timm"),
)
