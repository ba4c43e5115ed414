"""VideoMAE."""

from __future__ import annotations

from typing import Any

from vidtok.models.towers._base import Tower
from vidtok.models.towers._heads import Head, mean
from vidtok.models.towers.vit import BLOCKS, NormBefore, attention


def prefix(tower: Any) -> int:
    """None; where the first token speaks for the video, that one."""
    return 0 if tower.config.use_mean_pooling else 1


FAMILIES = (
    Tower(
        "videomae",
        ("VideoMAEModel",),
        BLOCKS,
        NormBefore(),
        attention,
        prefix,
        heads=(Head(("VideoMAEForVideoClassification",), "fc_norm", mean),),
        dense=("VideoMAEForPreTraining",),
    ),
)
