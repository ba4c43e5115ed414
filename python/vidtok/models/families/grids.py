"""Families whose videos are patches on grids, in front of a language model with one row of positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok.models.families._base import Family, Grid, Media, grid_units, repeated


def _averaged(media: Media) -> list[tuple[Tensor, Grid]]:
    """Kimi's frames of a chunk are averaged: a chunk has one frame of tokens."""
    grids = media.input("grid_thw" if media.encoded is not None else f"{media.kind}_grid_thw")
    if grids is None:
        raise ValueError(f"expected visual features with their grids ({media.kind}_grid_thw), got features without")
    side: Any = media.module.config.vision_config.merge_kernel_size
    rows = repeated(grids.tolist(), media.encoded)
    return media.split([(1, int(h) // int(side[0]), int(w) // int(side[1])) for _, h, w in rows])


def _each_merged(media: Media) -> list[tuple[Tensor, Grid]]:
    """VideoLLaMA 3 has a merge size per video, and a mask of tokens that its processor left out.

    A video with such a mask counts as one row of tokens.
    """
    before = media.encoded is not None
    grids = media.input("grid_thw" if before else f"{media.kind}_grid_thw")
    sides = media.input("merge_sizes" if before else f"{media.kind}_merge_sizes")
    if grids is None or sides is None:
        raise ValueError(
            f"expected visual features with {media.kind}_grid_thw and {media.kind}_merge_sizes, got features without"
        )
    rows = repeated([[*g, s] for g, s in zip(grids.tolist(), sides.tolist())], media.encoded)
    found = [(int(t), int(h) // int(s), int(w) // int(s)) for t, h, w, s in rows]
    kept = media.arguments.get("video_compression_mask") if media.kind == "video" else None
    if kept is not None:
        parts = torch.as_tensor(kept).reshape(-1).split([t * h * w for t, h, w in found])
        found = [(1, 1, int(part.sum())) if not bool(part.all()) else grid for part, grid in zip(parts, found)]
    return media.split(found)


FAMILIES = (
    Family("exaone4_5", "Exaone4_5_Model", ("Exaone4_5_ForConditionalGeneration",), grid_units(), positions="rope"),
    Family(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2Model",
        ("HyperCLOVAXVisionV2ForConditionalGeneration",),
        grid_units(),
        towers=("vision_model",),
        positions="rope",
    ),
    Family(
        "video_llama_3",
        "VideoLlama3Model",
        ("VideoLlama3ForConditionalGeneration",),
        _each_merged,
        towers=("vision_model",),
        positions="rope",
    ),
    Family(
        "kimi_k25",
        "Kimi_K25Model",
        ("Kimi_K25ForConditionalGeneration",),
        _averaged,
        towers=("vision_tower",),
        positions="rope",
        notes=("chunks of one frame: others raise at `torch.split(image_embeds, split_sizes)` unreduced too",),
    ),
    Family(
        "lfm3_vl",
        "Lfm3VlModel",
        ("Lfm3VlForConditionalGeneration",),
        grid_units(),
        towers=("vision_tower",),
        positions="rope",
    ),
    Family(
        "minimax_m3_vl",
        "MiniMaxM3VLModel",
        ("MiniMaxM3SparseForConditionalGeneration",),
        grid_units(),
        towers=("vision_tower",),
        positions="rope",
        # The index picks blocks of columns by `k_positions > position_ids`, which counts padding on one side only.
        unpadded=("minimax_m3_sparse",),
        notes=("its sparse layers take no padded rows, reduced or not",),
    ),
    Family(
        "muse_glimmer",
        "MuseGlimmerModel",
        ("MuseGlimmerForConditionalGeneration",),
        grid_units("merge_size"),
        towers=("vision_tower",),
        positions="rope",
    ),
    Family(
        "muse_spark",
        "MuseSparkModel",
        ("MuseSparkForConditionalGeneration",),
        grid_units("merge_size"),
        towers=("vision_tower",),
        positions="rope",
    ),
    Family(
        "dots3_note",
        "Dots3NoteModel",
        ("Dots3NoteForConditionalGeneration",),
        grid_units(),
        towers=("vision_tower",),
        positions="rope",
    ),
)
