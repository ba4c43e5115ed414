"""Position embeddings: sines and cosines of time, row and column."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidtok import _check


def sincos(channels: int, places: Tensor) -> Tensor:
    r"""fp32 ``[N, channels]``: :math:`\sin` then :math:`\cos` of :math:`p \cdot 10000^{-2i / channels}`.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, §3.5.
    """
    speed = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angle = places.double()[:, None] * speed
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def spatial(channels: int, rows: int, columns: int) -> Tensor:
    """fp32 ``[rows * columns, channels]``, half of the channels for the column and half for the row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos(channels // 2, column.flatten()), sincos(channels // 2, row.flatten())], 1)


def joint(channels: int, grid: tuple[int, int, int]) -> Tensor:
    """fp32 ``[1, 1 + T * H * W, channels]``: a quarter of the channels for time, zeros for the class token."""
    time, rows, columns = grid
    when = sincos(channels // 4, torch.arange(time))[:, None].expand(-1, rows * columns, -1)
    where = spatial(channels // 4 * 3, rows, columns)[None].expand(time, -1, -1)
    patches = torch.cat([when, where], 2).flatten(0, 1)
    return torch.cat([patches.new_zeros(1, channels), patches])[None]


def resample(embedding: Tensor, steps: int, to: int, prefix: int) -> Tensor:
    """An embedding ``[1, prefix + steps * N, C]`` for ``to`` steps in time, interpolated between their centres.

    Raises:
        ValueError: an embedding that ``steps`` does not divide.
    """
    head, patches = embedding[:, :prefix], embedding[:, prefix:]
    if steps < 1 or patches.shape[1] % steps:
        _check.fail(f"a position embedding of {steps} steps in time", embedding)
    lines = patches.float().unflatten(1, (steps, -1)).permute(0, 2, 3, 1).flatten(0, 1)
    out = F.interpolate(lines, size=to, mode="linear", align_corners=False)
    out = out.unflatten(0, (1, -1)).permute(0, 3, 1, 2).flatten(1, 2)
    return torch.cat([head, out.to(embedding.dtype)], 1)
