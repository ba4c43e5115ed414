"""Token merging in a CLIP tower as published (Bolya et al., ICLR 2023, §3), over the modules of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.bipartite import _merge, match


def _split(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def attention(module: Any, x: Tensor, size: Tensor | None, fused: bool) -> tuple[Tensor, Tensor]:
    """Attention with log(size) added to its scores, and its keys."""
    heads = module.num_heads
    q, k, v = (_split(project(x), heads) for project in (module.q_proj, module.k_proj, module.v_proj))
    bias = None if size is None else size.log()[:, None, None, :, 0]
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=module.scale)
    else:
        scores = (q * module.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        out = scores.softmax(dim=-1) @ v
    return module.out_proj(out.transpose(1, 2).reshape(x.shape)), k


def block(layer: Any, x: Tensor, size: Tensor | None, r: int, fused: bool) -> tuple[Tensor, Tensor | None]:
    """One block: attention, merging, MLP."""
    attended, keys = attention(layer.self_attn, layer.layer_norm1(x), size, fused)
    x = x + attended
    r = min(r, (x.shape[1] - 1) // 2)
    if r > 0:
        with torch.no_grad():
            lists = match(keys.mean(1), r)
        size = torch.ones_like(x[..., 0, None]) if size is None else size
        x = _merge(x * size, *lists)
        size = _merge(size, *lists)
        x = x / size
    return x + layer.mlp(layer.layer_norm2(x)), size


def tower(model: Any, pixels: Tensor, r: int, fused: bool = False) -> Tensor:
    """The class token of a CLIP tower in which every block merges ``r`` tokens.

    ``fused`` is the careful user's version: the same with the fused attention and log(size) as its mask.
    """
    inner = getattr(model, "vision_model", model)
    x, size = inner.pre_layrnorm(inner.embeddings(pixels)), None
    for layer in inner.encoder.layers:
        x, size = block(layer, x, size, r, fused)
    return inner.post_layernorm(x[:, 0])


def cut(model: Any, pixels: Tensor, r: int) -> Tensor:
    """The same tower when every block leaves out its last ``r`` tokens: what merging would take if it took nothing."""
    inner = getattr(model, "vision_model", model)
    x = inner.pre_layrnorm(inner.embeddings(pixels))
    for layer in inner.encoder.layers:
        x = x + attention(layer.self_attn, layer.layer_norm1(x), None, fused=True)[0]
        x = x[:, : x.shape[1] - min(r, (x.shape[1] - 1) // 2)].contiguous()
        x = x + layer.mlp(layer.layer_norm2(x))
    return inner.post_layernorm(x[:, 0])
