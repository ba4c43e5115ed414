"""Packed rows, laid out with one sample per row and back."""

from __future__ import annotations

import torch
from torch import Tensor


class Unpacked:
    """Where the columns of packed rows lie when each sample has a row of its own.

    Args:
        sample: int64 ``[B, L]``, equal for neighbours of one sample; −1 for padding.
    """

    def __init__(self, sample: Tensor) -> None:
        self.shape = sample.shape
        first = torch.nn.functional.pad(sample.diff(dim=1) != 0, (1, 0), value=True).reshape(-1)
        real = (sample >= 0).reshape(-1)
        # Samples are numbered over all rows; stretches of padding get no number.
        number = ((first & real).cumsum(0) - 1)[real]
        column = real.nonzero().squeeze(1)
        count = torch.bincount(number)
        rank = torch.arange(column.shape[0], device=column.device) - (count.cumsum(0) - count)[number]
        width = int(count.max()) if count.numel() else 0
        self.index = torch.full((count.shape[0], width), -1, dtype=torch.int64, device=sample.device)
        self.index[number, width - count[number] + rank] = column

    @property
    def valid(self) -> Tensor | None:
        """bool ``[S, L']``, False for padding; None when all samples are equally long."""
        valid = self.index >= 0
        return None if bool(valid.all()) else valid

    def unpack(self, x: Tensor, fill: float) -> Tensor:
        """``[B, L]`` to ``[S, L']``; padding gets ``fill``."""
        return x.reshape(-1)[self.index.clamp(min=0)].masked_fill(self.index < 0, fill)

    def pack(self, y: Tensor, fill: float) -> Tensor:
        """``[S, L']`` to ``[B, L]``; padding gets ``fill``."""
        out = y.new_full((self.shape[0] * self.shape[1],), fill)
        used = self.index >= 0
        out[self.index[used]] = y[used]
        return out.view(self.shape)
