"""DINOv2, with and without registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vidtok.merge.run import Step
from vidtok.models.towers._base import Tower
from vidtok.models.towers._full import recorded
from vidtok.models.towers._heads import Head, class_and_mean
from vidtok.models.towers._masks import real
from vidtok.models.towers.vit import attend, attention


class Scaled:
    """``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``."""

    def real(self, x: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
        return real(x, attention_mask)

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        return block.drop_path(block.layer_scale1(attend(block, block.norm1(x), step, args, kwargs))) + x

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


def registers(tower: Any) -> int:
    """The class token and the register tokens."""
    return 1 + tower.config.num_register_tokens


def stages(tower: Any, merging: Any) -> Callable[[], None]:
    """A backbone makes its feature maps of what its encoder records."""
    encoder = getattr(tower, "encoder", None) or getattr(tower, "model", None)
    return recorded(encoder, merging) if merging.full_length and encoder is not None else lambda: None


FAMILIES = (
    Tower(
        "dinov2",
        ("Dinov2Model", "Dinov2Backbone"),
        ("encoder.layer",),
        Scaled(),
        attention,
        extras=(stages,),
        heads=(Head(("Dinov2ForImageClassification",), "classifier", class_and_mean),),
        dense=("Dinov2Backbone",),
    ),
    Tower(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("encoder.layer",),
        Scaled(),
        attention,
        registers,
        extras=(stages,),
        heads=(Head(("Dinov2WithRegistersForImageClassification",), "classifier", class_and_mean),),
        dense=("Dinov2WithRegistersBackbone",),
    ),
)
