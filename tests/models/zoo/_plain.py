"""Batches for plain language models: random vectors stand for the frames at placeholders that the caller names."""

from __future__ import annotations

from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common, _frames

#: Frames of ``side`` tokens; two videos in the second row.
ROWS: list[list[Clip]] = [[("video", 4, 56)], [("video", 2, 56), ("video", 3, 56)], [("video", 3, 28)]]


def batch(samples: list[list[Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    """``input_ids`` whose placeholders are distinct words, so that what is kept shows."""
    out = _frames.text(samples, lambda n, size, g: [_common.VIDEO] * (n * (size // 28) ** 2), side, seed)
    return out


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    """Row ``i`` alone, without padding."""
    return _common.alone(inputs, i)
