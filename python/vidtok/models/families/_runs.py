"""Rules for videos that are told apart by stretches of placeholder tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidtok.models.families._base import Grid, Media, Rule

#: Height and width of a frame's tokens, from the model's config.
Side = Callable[[Any], tuple[int, int]]
#: Height and width of the tokens of each frame of a call, None where it does not say them.
Sides = Callable[[Media], list[tuple[int, int]] | None]


def dense_units(side: Side | None = None, extra: int = 0) -> Rule:
    """Units of videos ``[V, T, C, H, W]``: T frames of ``side`` tokens and ``extra`` special ones at the end.

    Features ``[V·T, N, C]`` made before the call no longer tell videos apart: the text between them does.

    Args:
        side: of a frame; None where features, or pixels, tell it.
        extra: special tokens behind the last frame, which count as text.
    """

    def rule(media: Media) -> list[tuple[Tensor, Grid]]:
        if media.kind == "image":
            return [(run, (1, 1, run.numel())) for run in media.runs()]
        pixels: Any = media.arguments.get("pixel_values_videos")
        features: Any = getattr(media.encoded, "pooler_output", None)
        total, videos = media.columns.shape[0], 0
        if media.encoded is None:
            videos = len(pixels)
            shape = side(media.module.config) if side else square(total // max(videos * pixels.shape[1], 1))
        elif side:
            videos = len(features)
            shape = side(media.module.config)
        else:
            shape = square(features.shape[1])
        per = shape[0] * shape[1]
        parts = media.columns.split(total // videos) if videos and total % videos == 0 else media.runs()
        units = []
        for part in parts:
            frames, rest = divmod(part.numel() - extra, per)
            if rest or frames < 1:
                raise ValueError(
                    f"expected {per} tokens for each frame of a video and {extra} behind the last, "
                    f"got {part.numel()} (prefill_chunk_size and truncated prompts cannot be reduced)"
                )
            units.append((part[: frames * per], (frames, *shape)))
        return units

    return rule


def frame_units(gap: int = 10, numbered: bool = True, marked: bool = False, sides: Sides | None = None) -> Rule:
    """Units of videos that come as images, a stretch of placeholders per frame.

    Stretches of one length with at most ``gap`` tokens between them are frames of one video. A stretch alone
    is an image.

    Args:
        gap: tokens between two frames at most.
        numbered: whether a frame may be told by its number, so that the text before a video's first frame
            comes again before the next video's.
        marked: whether tokens end and begin a frame, and others the tiles that a single image is cut into.
        sides: of the frames, for those whose rows are stretches of their own.
    """

    def rule(media: Media) -> list[tuple[Tensor, Grid]]:
        known = None if sides is None else sides(media)
        frames = None if known is None else media.split([(1, h, w) for h, w in known])
        runs = media.runs() if frames is None else [columns for columns, _ in frames]
        if not runs:
            return []
        shapes = [square(r.numel()) for r in runs] if frames is None else [(h, w) for _, (_, h, w) in frames]
        ends = torch.stack([torch.stack([r[0], r[-1]]) for r in runs]).tolist()
        ids = media.arguments.get("input_ids")
        flat = None if ids is None else ids.reshape(-1).tolist()

        def label(k: int) -> list[int] | None:
            return None if flat is None else flat[max(ends[k][0] - 5, 0) : ends[k][0]]

        groups: list[list[int]] = []
        for k, run in enumerate(runs):
            group = groups[-1] if groups else []
            joined = bool(group) and (
                not media.apart(ends[k - 1][0], ends[k][0])
                and ends[k][0] - ends[k - 1][1] - 1 <= gap
                and run.numel() == runs[k - 1].numel()
                and shapes[k] == shapes[k - 1]
            )
            if marked and joined and flat is not None:
                joined = ends[k][0] - ends[k - 1][1] > 2 and flat[ends[k][0] - 1] == flat[ends[k - 1][0] - 1]
            if numbered and joined and len(group) > 1 and label(k) is not None:
                joined = label(k) != label(group[0]) or label(group[1]) == label(group[0])
            if joined:
                group.append(k)
            else:
                groups.append([k])
        return [(torch.cat([runs[k] for k in group]), (len(group), *shapes[group[0]])) for group in groups]

    return rule


def square(tokens: int) -> tuple[int, int]:
    """Height and width of a frame: a square where that is possible, else a row."""
    side = int(tokens**0.5)
    return (side, side) if side * side == tokens else (1, tokens)
