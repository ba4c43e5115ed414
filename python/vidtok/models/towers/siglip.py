"""SigLIP and SigLIP2, which have no class token and pool with a query of their own."""

from __future__ import annotations

from torch import nn

from vidtok.models.towers._base import Tower
from vidtok.models.towers._heads import Head, mean, pooling_attention
from vidtok.models.towers.clip import PreNorm, attention

_BLOCKS = ("encoder.layers", "vision_model.encoder.layers")


def none(tower: nn.Module) -> int:
    return 0


FAMILIES = (
    Tower(
        "siglip",
        ("SiglipVisionModel", "SiglipVisionTransformer"),
        _BLOCKS,
        PreNorm(),
        attention,
        none,
        extras=(pooling_attention("head", "vision_model.head"),),
        heads=(Head(("SiglipForImageClassification",), "classifier", mean),),
    ),
    Tower(
        "siglip2",
        ("Siglip2VisionModel", "Siglip2VisionTransformer"),
        _BLOCKS,
        PreNorm(),
        attention,
        none,
        extras=(pooling_attention("head", "vision_model.head"),),
        # It takes the mean over the tokens that the caller's mask names.
        dense=("Siglip2ForImageClassification",),
    ),
)
