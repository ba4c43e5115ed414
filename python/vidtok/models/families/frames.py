"""Families whose videos are frames, each a stretch of placeholder tokens of its own."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from vidtok.models.families._base import Family, Grid, Media, repeated
from vidtok.models.families._runs import frame_units, square

_ADJACENT, _NEAR = frame_units(gap=4, numbered=False), frame_units()


def _sized(media: Media) -> list[tuple[int, int]] | None:
    """Mistral 3 breaks images after each row of tokens: sizes, or features made before, tell them apart."""
    sizes = media.input("image_sizes")
    if sizes is None:
        parts = getattr(media.encoded, "pooler_output", None)
        return None if parts is None else [square(len(part)) for part in parts]
    config: Any = media.module.config
    side = int(config.vision_config.patch_size) * int(config.spatial_merge_size)
    return repeated([(int(h) // side, int(w) // side) for h, w in torch.as_tensor(sizes).tolist()], media.encoded)


def _packed(media: Media) -> list[tuple[Tensor, Grid]]:
    """MiniCPM packs frames into one row of patches; frames of a video lie between marks without other text."""
    name = "target_sizes_videos" if media.kind == "video" else "target_sizes"
    sizes = media.input("target_sizes" if media.encoded is not None else name)
    if media.kind == "image":
        units = [(run, (1, *square(run.numel()))) for run in media.runs()]
    else:
        units = _ADJACENT(media)
    if sizes is None or len(sizes) != sum(t for _, (t, _, _) in units):
        return units
    sized, at = [], 0
    for part, (frames, rows, columns) in units:
        height, width = (int(n) for n in sizes[at])
        merge = math.isqrt(height * width // (rows * columns))
        sized.append((part, (frames, height // merge, width // merge)))
        at += frames
    return sized


def _pooled(media: Media) -> list[tuple[Tensor, Grid]]:
    """Molmo 2 gives grids of pooled tokens with the call; with features made before, frames begin at a mark."""
    if media.encoded is None:
        grids = media.arguments.get("video_grids" if media.kind == "video" else "image_grids")
        if grids is None:
            raise ValueError(f"expected {media.kind}_grids with the pixels, got none")
        if media.kind == "video":
            return media.split([(int(t), int(h), int(w)) for t, h, w in grids.tolist()])
        return media.split([(1, 1, int(a) * int(b) + int(h) * int(w)) for a, b, h, w in grids.tolist()])
    parts = media.columns.split([len(part) for part in media.encoded.pooler_output])
    ids = media.arguments.get("input_ids")
    if media.kind == "image" or ids is None:
        return [(part, (1, 1, part.numel())) for part in parts]
    begun = (ids == media.module.config.frame_start_token_id).reshape(-1).cumsum(0)
    units = []
    for part in parts:
        frames = int(torch.unique(begun[part]).numel())
        per, rest = divmod(part.numel(), frames)
        if rest:
            frames, per = 1, part.numel()
        units.append((part, (frames, *square(per))))
    return units


def _tiled(media: Media) -> list[tuple[Tensor, Grid]]:
    """LLaVA-NeXT puts a newline behind each row of the tiles of an image, which stays."""
    if media.encoded is not None:
        features = torch.cat(list(media.encoded.pooler_output))
        newline = (features == media.module.image_newline.to(features)).all(-1).cpu()
    else:
        newline = torch.cat([_newlines(media.module, size) for size in media.arguments["image_sizes"]])
    if newline.numel() != media.columns.numel():
        raise ValueError(
            f"expected {newline.numel()} tokens for the images, got {media.columns.numel()} in this call "
            "(prefill_chunk_size and truncated prompts cannot be reduced)"
        )
    units = []
    for part, (frames, _, _) in _NEAR(media):
        at = torch.searchsorted(media.columns, part)
        own = part[~newline.to(part.device)[at]]
        units.append((own, (frames, *square(own.numel() // frames))))
    return units


def _newlines(module: Any, size: Tensor) -> Tensor:
    """bool: which tokens of an image of this size are newlines; its whole view comes before its tiles."""
    config, source = module.config, sys.modules[type(module).__module__]
    side = int(config.vision_config.image_size)
    width = side // int(config.vision_config.patch_size)
    whole = torch.zeros(width * width, dtype=torch.bool)
    if source.image_size_to_num_patches(size, config.image_grid_pinpoints, side) == 1:
        return torch.cat([whole, whole.new_ones(1)])
    rows, columns = source.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
    tiles = source.unpad_image(whole.new_zeros(1, rows * width, columns * width), size)[0]
    return torch.cat([whole, torch.nn.functional.pad(tiles, (0, 1), value=True).flatten()])


FAMILIES = (
    Family(
        "minicpmv4_6",
        "MiniCPMV4_6Model",
        ("MiniCPMV4_6ForConditionalGeneration",),
        _packed,
        towers=("vision_tower",),
        positions="rope",
    ),
    Family(
        "minicpm_ocr",
        "MiniCPMOcrModel",
        ("MiniCPMOcrForConditionalGeneration",),
        _packed,
        towers=("vision_tower",),
        positions="rope",
    ),
    Family(
        "minicpmv4_7",
        "MiniCPMV4_7Model",
        ("MiniCPMV4_7ForConditionalGeneration",),
        _packed,
        towers=("vision_tower",),
    ),
    Family(
        "molmo2",
        "Molmo2Model",
        ("Molmo2ForConditionalGeneration",),
        _pooled,
        towers=("vision_tower",),
        positions="rope",
        base_masks=True,
        images=False,
        tagged=False,
    ),
    Family(
        "smolvlm",
        "SmolVLMModel",
        ("SmolVLMForConditionalGeneration",),
        # The text between two frames tells the time of the second in minutes and seconds, a sentence the next video.
        frame_units(gap=18, numbered=False, marked=True),
        language="text_model",
        towers=("vision_model",),
        positions="rope",
        images=False,
        frames=True,
    ),
    Family(
        "idefics3",
        "Idefics3Model",
        ("Idefics3ForConditionalGeneration",),
        frame_units(marked=True),
        language="text_model",
        towers=("vision_model",),
        positions="rope",
        images=False,
        frames=True,
    ),
    Family(
        "ovis2",
        "Ovis2Model",
        ("Ovis2ForConditionalGeneration",),
        frame_units(marked=True),
        towers=("vision_tower",),
        positions="rope",
        images=False,
        frames=True,
    ),
    Family(
        "mistral3",
        "Mistral3Model",
        ("Mistral3ForConditionalGeneration",),
        frame_units(sides=_sized),
        towers=("vision_tower",),
        positions="rope",
        images=False,
        frames=True,
    ),
    Family(
        "llava_next",
        "LlavaNextModel",
        ("LlavaNextForConditionalGeneration",),
        _tiled,
        towers=("vision_tower",),
        positions="rope",
        images=False,
        frames=True,
    ),
)
