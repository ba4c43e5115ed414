"""Batches of the families whose videos come as frames: dense ``[V, T, C, H, W]`` or one image per frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common
from tests.models.zoo._common import END, IMAGE, START, VIDEO

#: Tokens of a clip from its frames, its side in pixels and a generator of text.
Layout = Callable[[int, int, torch.Generator], list[int]]
#: Three rows of equal frame counts and sizes, and of unequal text, for videos that share one tensor.
DENSE: list[list[Clip]] = [[("video", 4, 56)], [("video", 4, 56), ("video", 4, 56)], [("video", 4, 56)]]
#: Three rows of unequal frame counts, for videos that are runs of frames.
RUNS: list[list[Clip]] = [[("video", 4, 56)], [("video", 2, 56), ("video", 3, 56)], [("video", 3, 56)]]


def siglip(**options: Any) -> dict[str, Any]:
    """A SigLIP tower that makes 4×4 patches of a 56-pixel frame."""
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **_vit(), **options}


def clip_tower(**options: Any) -> dict[str, Any]:
    """A CLIP tower that makes 4×4 patches and a class token of a 56-pixel frame."""
    return {"model_type": "clip_vision_model", "projection_dim": 32, **_vit(), **options}


def _vit() -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 56,
    }  # fmt: skip


def run(per: int, extra: int = 0, token: int = VIDEO) -> Layout:
    """A video as one run of placeholders: ``per`` of each frame and ``extra`` at the end."""
    return lambda frames, side, g: [START, *[token] * (frames * per + extra), END]


def runs(cell: int, token: int = IMAGE, over: int = 1) -> Layout:
    """A video as one run of placeholders per frame (or ``over`` frames), each behind two text tokens.

    Each ``cell``×``cell`` pixels of a frame are a token.
    """

    def tokens(frames: int, side: int, g: torch.Generator) -> list[int]:
        per = [START, *[token] * (side // cell) ** 2, END]
        return [t for _ in range(-(-frames // over)) for t in (*_common.words(2, g), *per)]

    return tokens


def text(samples: list[list[Clip]], tokens: Layout, side: str, seed: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows with these clips, nine words between two of them."""
    rows = []
    for i, clips in enumerate(samples):
        g = torch.Generator().manual_seed(seed + i)
        row = _common.words(3, g)
        for j, (_, count, size) in enumerate(clips):
            row += [*(_common.words(9, g) if j else ()), *tokens(count, size, g)]
        rows.append(row + _common.words(4 + 2 * i, g))
    return _common.padded(rows, side)


def pixels(samples: list[list[Clip]]) -> list[Tensor]:
    """Frames of each clip in the order of the batch."""
    return [_common.clip(i, j, n, size) for i, clips in enumerate(samples) for j, (_, n, size) in enumerate(clips)]


def per_frame_row(
    inputs: dict[str, Tensor],
    samples: list[list[Clip]],
    i: int,
    *names: str,
    per_video: tuple[str, ...] = (),
    over: int = 1,
) -> dict[str, Tensor]:
    """Row ``i`` where ``names`` hold one entry per frame (or ``over`` frames) and ``per_video`` one per clip."""
    sizes = [sum(-(-n // over) for _, n, _ in clips) for clips in samples]
    first = sum(sizes[:i])
    clips = sum(map(len, samples[:i]))
    return {
        **_common.alone(inputs, i),
        **{n: inputs[n][first : first + sizes[i]] for n in names},
        **{n: inputs[n][clips : clips + len(samples[i])] for n in per_video},
    }


def patches(frames: list[Tensor], patch: int) -> tuple[Tensor, Tensor]:
    """Patches ``[F, N, 3·patch²]`` in [0, 1] of all frames, and their places ``[F, N, 2]`` padded with -1."""
    flat = [f for x in frames for f in x]
    sizes = [f.shape[-1] // patch for f in flat]
    most = max(sizes) ** 2
    values, places = torch.zeros(len(flat), most, 3 * patch**2), torch.full((len(flat), most, 2), -1)
    for k, (f, n) in enumerate(zip(flat, sizes)):
        x = f.reshape(3, n, patch, n, patch).permute(1, 3, 2, 4, 0).reshape(n * n, -1)
        values[k, : n * n] = x / 2 + 0.5
        y = torch.arange(n)
        places[k, : n * n] = torch.stack([y.repeat(n), y.repeat_interleave(n)], -1)
    return values, places
