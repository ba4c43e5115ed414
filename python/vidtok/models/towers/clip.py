"""CLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidtok.merge.run import Step
from vidtok.models.towers._attention import call
from vidtok.models.towers._base import Tower
from vidtok.models.towers._heads import Head, mean
from vidtok.models.towers._masks import follow, real


class PreNorm:
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def real(self, x: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
        return real(x, attention_mask)

    def attend(self, block: Any, x: Tensor, step: Step, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        # In 4.57 the masks and output_attentions come by position, and a tuple is returned.
        tuples = bool(args) or "causal_attention_mask" in kwargs
        kwargs |= dict(zip(("causal_attention_mask", "output_attentions"), args, strict=False))
        mask = follow(step, attention_mask)
        out = call(block.self_attn, step, hidden_states=block.layer_norm1(x), attention_mask=mask, **kwargs)
        x = x + out[0]
        if tuples:
            return (x, out[1]) if kwargs.get("output_attentions") else (x,)
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
        heads=(Head(("CLIPForImageClassification",), "classifier", mean),),
    ),
)
