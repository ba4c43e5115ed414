"""open_clip's VisionTransformer, which is known by name; its timm towers are timm's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge.run import Step, weighted_mean
from vidtok.models.towers._base import Tower
from vidtok.models.towers._full import _Hook
from vidtok.models.towers._heads import sizes
from vidtok.models.towers._override import override
from vidtok.models.towers.timm import fused, maps

_BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock")


def attention(attn: Any, x: Tensor, step: Step) -> Tensor:
    """``nn.MultiheadAttention`` or open_clip's own ``Attention`` of ``x`` to itself, whose keys weigh by size."""
    if step.idle:
        # PyTorch has a fused path of its own in evaluation.
        return attn(x, x, x, need_weights=False)[0] if isinstance(attn, nn.MultiheadAttention) else attn(x)
    packed = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(attn, nn.MultiheadAttention):
        dropout = attn.dropout
    else:
        q, k, dropout = attn.ln_q(q), attn.ln_k(k), attn.attn_drop.p
    attend = partial(fused, step=step, dropout=dropout if attn.training else 0.0, width=q.shape[-1])
    out = step.attention(q, k, v, attend=attend)
    if isinstance(attn, nn.MultiheadAttention):
        return attn.out_proj(out.transpose(1, 2).flatten(2))
    out = out if attn.head_scale is None else out * attn.head_scale
    return attn.out_drop(attn.out_proj(attn.ln_inner(out.transpose(1, 2).flatten(2))))


class OpenClipBlock:
    """``x + ls_1(attention(ln_1(x)))``, then ``x + ls_2(mlp(ln_2(x)))``."""

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Tensor:
        given = [name for name, value in kwargs.items() if value is not None]
        if given or any(arg is not None for arg in args):
            _say(
                "a vision block of open_clip to be called with its tokens alone",
                ", ".join(given) or "further arguments",
            )
        out = attention(block.attn, block.ln_1(x), step)
        return x + block.ls_1(block.ln_attn(out) if hasattr(block, "ln_attn") else out)

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.ls_2(block.mlp(block.ln_2(x)))


def _say(expected: str, got: str) -> None:
    raise ValueError(f"expected {expected}, got {got}")


def _fits(tower: Any, merging: Any) -> Callable[[], None]:
    for block in tower.transformer.resblocks:
        kind, attn = type(block).__name__, block.attn
        if kind not in _BLOCKS:
            _say(f"blocks of a supported class ({', '.join(_BLOCKS)})", kind)
        if isinstance(attn, nn.MultiheadAttention):
            if not attn.batch_first or attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
                _say("attention over [B, T, C] with one projection for queries, keys and values", "another form")
        elif getattr(attn, "logit_scale", None) is not None:
            _say("attention by scaled dot products", "scaled cosines")
    return lambda: None


def _pool(tower: Any, merging: Any) -> Callable[[], None]:
    """Weigh by size what the tower pools."""
    undo: list[Callable[[], None]] = []
    poolers = [tower.attn_pool] if tower.attn_pool is not None else []
    if poolers and getattr(tower, "attn_pool_type", "") == "parallel":
        poolers.append(tower.attn_pool_contrastive)

    def weigh(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = sizes(merging)
        if size is None or args[1].shape[:2] != size.shape:
            return None
        bias = size.log().to(args[0].dtype).repeat_interleave(attn.num_heads, 0)[:, None]
        return args, {**kwargs, "attn_mask": bias.expand(-1, args[0].shape[1], -1)}

    for pooler in poolers:
        undo.append(pooler.attn.register_forward_pre_hook(_Hook(weigh), with_kwargs=True).remove)

    def pool(tower: Any, own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        size = sizes(merging)
        if size is None or poolers or tower.pool_type != "avg" or size.shape != x.shape[:2]:
            return own(x)
        return weighted_mean(x, size, 1), x[:, 1:]

    undo.append(override(tower, _global_pool=pool, forward_intermediates=maps(merging)))

    def back() -> None:
        while undo:
            undo.pop()()

    return back


def _none(block: nn.Module) -> list[nn.Module]:
    return []


FAMILIES = (
    Tower(
        "open_clip",
        ("VisionTransformer",),
        ("transformer.resblocks",),
        OpenClipBlock(),
        _none,
        extras=(_fits, _pool),
        package="open_clip",
    ),
)
