"""NVIDIA's hybrid of Mamba and attention layers: no positions, and the base owns the head."""

from __future__ import annotations

from vidtok.models.families._base import Family
from vidtok.models.families._runs import frame_units

_OMNI = "NemotronH_Omni_Reasoning_V3"

FAMILIES = (
    Family(
        "nemotron_h_omni",
        _OMNI,
        (_OMNI,),
        frame_units(),
        towers=("vision_model",),
        positions="none",
        tagged=False,
        frames=True,
        notes=("videos come as images, one per frame: the unreduced model raises on pixel_values_videos",),
    ),
)
