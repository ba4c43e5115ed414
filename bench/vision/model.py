"""Towers of these measurements, the schedule of their tokens, and their operations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidtok.merge import Schedule

MERGES = (0, 4, 8, 13, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A ViT."""

    name: str
    width: int
    layers: int
    heads: int
    patch: int
    image: int

    @property
    def intermediate(self) -> int:
        return 4 * self.width

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    def merges(self, r: int) -> tuple[int, ...]:
        """Merges of each block."""
        return Schedule(r=r).counts(self.layers, self.tokens, 1)

    def mlp_tokens(self, r: int) -> int:
        """Tokens that enter the MLPs, all blocks together."""
        left, out = self.tokens, 0
        for merges in self.merges(r):
            left -= merges
            out += left
        return out

    def flops(self, r: int) -> float:
        """Operations of one image."""
        c, left = self.width, self.tokens
        total = 2.0 * (left - 1) * c * 3 * self.patch**2
        for merges in self.merges(r):
            total += 8.0 * left * c * c + 4.0 * left * left * c
            left -= merges
            total += 4.0 * left * c * self.intermediate
        return total

    def ideal(self, r: int) -> float:
        """Speed-up that the removed operations allow."""
        return self.flops(0) / self.flops(r)


BASE = Shape("ViT-B/16-224", 768, 12, 12, 16, 224)
LARGE = Shape("ViT-L/14-336", 1024, 24, 16, 14, 336)
TINY = Shape("tiny", 64, 6, 4, 16, 160)


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A CLIP tower with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, image_size=shape.image, patch_size=shape.patch, projection_dim=shape.width,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = CLIPVisionModel(config).eval()
    for name, weight in model.named_parameters():
        # With the library's own small weights every token attends to all others alike.
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 4
    return model.to(dtype)


def twin(model: Any) -> Any:
    """The same weights in another model object."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def images(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Smooth noise, so that neighbours are alike."""
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.randn(batch, 3, shape.image // 8, shape.image // 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(shape.image, shape.image), mode="bilinear")
    return (fine + 0.2 * torch.randn(fine.shape, generator=generator)).to(device, dtype)
