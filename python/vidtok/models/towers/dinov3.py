"""DINOv3, whose patches are rotated by their places in the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidtok.merge.run import Step
from vidtok.models.towers._base import Tower
from vidtok.models.towers.dinov2 import Scaled, registers, stages
from vidtok.models.towers.vit import attention


class Rotated(Scaled):
    """As DINOv2; a merged token is rotated as its destination is."""

    follow = True

    def attend(
        self,
        block: Any,
        x: Tensor,
        step: Step,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        place = step.place
        if place is not None and position_embeddings is not None:
            # Prefix tokens are not rotated, and stay in front.
            prefix = step.run.tokens[0] - position_embeddings[0].shape[-2]
            patches = place[:, prefix:] - prefix
            position_embeddings = tuple(part[patches].unsqueeze(1) for part in position_embeddings)
        kwargs |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return super().attend(block, x, step, **kwargs)


FAMILIES = (
    Tower(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("model.layer", "layer"),
        Rotated(),
        attention,
        registers,
        extras=(stages,),
        dense=("DINOv3ViTBackbone",),
    ),
)
