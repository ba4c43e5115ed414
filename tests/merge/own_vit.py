"""A small ViT as a user would write it, which vidtok does not know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEADS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)

    def forward(self, tokens: Tensor, shift: float = 0.0) -> Tensor:
        x = tokens + self.proj(F.scaled_dot_product_attention(*self.heads(tokens)).transpose(1, 2).flatten(2)) + shift
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    """Tokens in, tokens out; the first one is a class token."""

    def __init__(self, layers: int = 4, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleDict({"blocks": nn.ModuleList(Block(width) for _ in range(layers))})
        for name, p in self.named_parameters():
            if p.dim() > 1:
                p.data *= 5 if "qkv" in name else 2

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stages["blocks"]:
            x = block(x)
        return x


def attend(block: Block, x: Tensor, step, shift: float = 0.0) -> Tensor:
    return x + block.proj(step.attention(*block.heads(x)).transpose(1, 2).flatten(2)) + shift


def feed(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm2(x))


def tokens(batch: int = 2, length: int = 17, width: int = 32) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


class Every(nn.Module):
    """Checkpoints of ``every`` blocks, or of all of them."""

    def __init__(self, model, every, reentrant):
        super().__init__()
        self.model, self.every, self.reentrant = model, every, reentrant

    def forward(self, x):
        blocks = list(self.model.stages["blocks"])
        for start in range(0, len(blocks), self.every):
            x = checkpoint(nn.Sequential(*blocks[start : start + self.every]), x, use_reentrant=self.reentrant)
        return x
