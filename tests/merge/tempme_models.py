"""Small towers and videos for merging across frames."""

from __future__ import annotations

import dataclasses

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.merge.own_vit import attend, feed
from vidtok.merge import TempMe, attach_any

SMALL = "tempme:frames=4,r=2,merge_layers=[1,2],merge_frames=[2,2]"
TOKENS = 17


def options(**changed) -> TempMe:
    own = TempMe(frames=4, r=2, merge_layers=(1, 2), merge_frames=(2, 2))
    return dataclasses.replace(own, **changed)


def put(model, own, **more):
    return attach_any(model, own, blocks="stages.blocks", halves=(attend, feed), **more)


def frames(count: int, tokens: int = TOKENS, width: int = 32) -> torch.Tensor:
    """Neighbours are alike, as in a video."""
    noise = torch.randn(count + 1, tokens, width, generator=torch.Generator().manual_seed(2))
    return noise[:1] + 0.6 * noise[1:]


def pixels(count: int) -> torch.Tensor:
    noise = torch.randn(count + 1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return noise[:1] + 0.6 * noise[1:]


def clip(layers: int = 4, **more) -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, image_size=32,
        patch_size=8, **more,
    )  # fmt: skip
    return sharp(CLIPVisionModel(config))


def sharp(model, attention=6.0, others=2.5):
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data *= attention if "q_proj" in name or "k_proj" in name else others
    return model.eval()


def tower(model):
    return getattr(model, "vision_model", model)


def close(got, want) -> bool:
    return bool((got - want).norm() <= 1e-5 * want.norm())
