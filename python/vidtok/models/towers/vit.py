"""ViT and DeiT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidtok.merge.run import Step
from vidtok.models.towers._attention import call
from vidtok.models.towers._base import Tower
from vidtok.models.towers._masks import follow, real


def inner(block: Any) -> Any:
    """The module that calls the attention function: inside another one in older versions."""
    return getattr(block.attention, "attention", block.attention)


def attention(block: nn.Module) -> list[Any]:
    return [inner(block)]


def attend(block: Any, x: Tensor, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a block's attention gives for the normalised tokens ``x``."""
    args = tuple(follow(step, arg) for arg in args)
    kwargs = {key: follow(step, value) for key, value in kwargs.items()}
    out = call(inner(block), step, x, *args, through=block.attention, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class NormBefore:
    """``x + attention(layernorm_before(x))``, then ``x + mlp(layernorm_after(x))``."""

    def real(self, x: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
        return real(x, attention_mask)

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        out = attend(block, block.layernorm_before(x), step, args, kwargs)
        dropout = getattr(block, "dropout", None)
        return (out if dropout is None else dropout(out)) + x

    def feed(self, block: Any, x: Tensor) -> Tensor:
        y = block.layernorm_after(x)
        if hasattr(block, "intermediate"):
            return block.output(block.intermediate(y), x)
        return block.dropout(block.mlp(y)) + x


def two(tower: nn.Module) -> int:
    return 2


BLOCKS = ("layers", "encoder.layer")

FAMILIES = (
    Tower("vit", ("ViTModel",), BLOCKS, NormBefore(), attention, dense=("ViTForMaskedImageModeling",)),
    Tower("deit", ("DeiTModel",), BLOCKS, NormBefore(), attention, two, dense=("DeiTForMaskedImageModeling",)),
)
