"""CLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidtok.merge.run import Step
from vidtok.models.towers._attention import call
from vidtok.models.towers._base import Tower


class PreNorm:
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        # In 4.57 the masks and output_attentions come by position, and a tuple is returned.
        names = ("attention_mask", "causal_attention_mask", "output_attentions")
        out = call(
            block.self_attn, step, hidden_states=block.layer_norm1(x), **dict(zip(names, args, strict=False)), **kwargs
        )
        x = x + out[0]
        if "output_attentions" in kwargs or len(args) > 1 or "causal_attention_mask" in kwargs:
            return (x, out[1]) if kwargs.get("output_attentions", len(args) > 2 and args[2]) else (x,)
        return x

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp(block.layer_norm2(x))


def attention(block: nn.Module) -> list[Any]:
    return [block.self_attn]


FAMILIES = (
    Tower(
        "clip",
        ("CLIPVisionModel", "CLIPVisionTransformer"),
        ("encoder.layers", "vision_model.encoder.layers"),
        PreNorm(),
        attention,
    ),
)
