"""STOP (CVPR 2025) vision tower in the published form, from its description: what ``vidtok.systems.stop`` is held to.

The sequence is token-major ``[4 + n T, B, C]``; the two attentions are two calls of multi-head attention, each of
which projects its own keys and values; the keys of a frame are put together frame by frame in Python; the last
layer computes every token. Build a model and run both forms::

    from bench.baselines import stop as published
    from vidtok.systems.stop import CLIP4Clip, Sizes

    model = CLIP4Clip(None, Sizes(), {"temporal_prompt": "DGL"}).eval()  # ViT-B/32; "group2-2" for all of STOP
    video = torch.randn(1, 12, 3, 224, 224)
    published.tower(model, video)  # [B, E], with model's own weights
    model.stop(model.clip.visual, video, model.tome)[0]  # the same; model.tome is None without merging
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(attn: Any, query: Tensor, key: Tensor) -> Tensor:
    """Multi-head attention ``[N, B, C]`` whose keys are also its values."""
    return F.multi_head_attention_forward(
        query, key, key, attn.width, attn.heads, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0,
        attn.out_proj.weight, attn.out_proj.bias, training=False, need_weights=False,
    )[0]  # fmt: skip


def layer(block: Any, adapter: Any, x: Tensor, frames: int, prompts: int) -> Tensor:
    """One layer over the token-major sequence."""
    length, batch, width = x.shape
    h = block.ln_1(x)
    shared = h[:prompts]
    own = h[prompts:].reshape((length - prompts) // frames, frames * batch, width)
    key1 = torch.zeros(prompts + own.shape[0], frames * batch, width, dtype=x.dtype, device=x.device)
    for t in range(frames):
        columns = slice(t * batch, (t + 1) * batch)
        key1[:, columns] = torch.cat([shared, own[:, columns]], 0)
    local = attend(block.attn, own, key1).reshape(length - prompts, batch, width)
    x = x + torch.cat([attend(block.attn, shared, h), local], 0)
    out = x + block.mlp(block.ln_2(x))
    return out if adapter is None else out + adapter(x)


def tower(model: Any, video: Tensor) -> Tensor:
    """Embeddings ``[B, E]`` of ``[B, T, 3, H, W]``, not normalised."""
    visual, stop = model.clip.visual, model.stop
    batch, frames = video.shape[:2]
    if stop.pixels is not None:
        video = stop.pixels(video)
    patches = visual.patches(video.flatten(0, 1))
    between = 0 if stop.between is None else stop.between(patches.unflatten(0, (batch, frames))).permute(2, 1, 0, 3)
    tokens = visual.prepare(patches).unflatten(0, (batch, frames)).permute(2, 1, 0, 3)
    count, width = stop.prompts.frame.shape[1:]
    shared = stop.prompts.video[:, None].expand(-1, batch, -1)
    slots = torch.empty(count, frames, batch, width, dtype=tokens.dtype, device=tokens.device)
    x = torch.cat([shared, torch.cat([tokens[:1], slots, tokens[1:]]).flatten(0, 1)])
    start = shared.shape[0] + frames
    for index, block in enumerate(visual.transformer.resblocks):
        own = stop.prompts.frame[index][:, None, None] + between
        own = own.expand(count, frames, batch, width).flatten(0, 1)
        x = torch.cat([x[:start], own, x[start + count * frames :]])
        x = layer(block, stop.adapters[index] if len(stop.adapters) else None, x, frames, shared.shape[0])
    return visual.ln_post(x[0]) @ visual.proj
