"""A small InternVideo2 and clips for it."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.systems.internvideo2 import InternVideo2, InternVideo2Config

LAYERS, HEADS, WIDTH, MERGES = 3, 2, 32, [7, 5, 4]
TINY = {
    "img_size": 28, "num_frames": 4, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "init_values": 0.6,
    "attn_pool_num_heads": 4, "clip_embed_dim": 8,
}  # fmt: skip


def make(**options) -> InternVideo2:
    torch.manual_seed(0)
    model = InternVideo2(InternVideo2Config(**{**TINY, **options})).eval()
    for name, p in model.named_parameters():
        if "pos_embed" not in name:
            p.data.normal_(0.0 if p.dim() > 1 else 0.4, 0.5 if "qkv" in name or "cross_attn" in name else 0.2)
    return model


def clip(batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, frames, 28, 28, generator=torch.Generator().manual_seed(1))
