"""Which columns of the language model's rows are visual, and of which video or image and frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidtok import ops
from vidtok.models.report import Unit
from vidtok.plan import Plan


@dataclass(frozen=True)
class Tokens:
    """The visual tokens of a batch of rows.

    Args:
        unit: int32 ``[B, L]``, index into ``units``; −1 for text and padding.
        frame: int32 ``[B, L]``, frame of the token in its unit; −1 for text and padding.
        units: the videos and images.
        valid: bool ``[B, L]``, False for padding; None when every column is real.
        group: int32 ``[B, L]``, number of the token's group in its unit, −1 for text and padding: means over
            several frames apart from what lies in one, for each frame at which they stand. None before any
            merge, when frames are the groups.
    """

    unit: Tensor
    frame: Tensor
    units: list[Unit]
    valid: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def of(
        cls, columns: Tensor, units: Sequence[Unit], sizes: Sequence[int], shape: tuple[int, int], valid: Tensor | None
    ) -> Tokens:
        """Lay out units whose packed row columns come one after another, ``sizes`` of each.

        A unit's tokens are frame by frame: token i of a unit of t frames lies in frame ⌊i·t/n⌋.
        """
        device = columns.device
        unit = torch.full((shape[0] * shape[1],), -1, dtype=torch.int32, device=device)
        frame = unit.clone()
        owner, step = [], []
        for i, (u, n) in enumerate(zip(units, sizes)):
            owner.append(torch.full((n,), i, dtype=torch.int32))
            step.append((torch.arange(n) * u.grid_thw[0] // max(n, 1)).to(torch.int32))
        if columns.numel():
            unit[columns] = torch.cat(owner).to(device)
            frame[columns] = torch.cat(step).to(device)
        return cls(unit.view(shape), frame.view(shape), list(units), valid)

    def after(self, rows: Plan) -> Tokens:
        """The tokens of rows that a plan made from these (``Plan.lift(..., dense=True)``)."""
        carried = [self.unit, self.frame] if self.group is None else [self.unit, self.frame, self.group]
        unit, frame, *rest = ops.position_remap(rows, *carried, dim=-1, fill=-1)
        group = rest[0] if rest else None if rows.is_gather else self._groups(rows, frame)
        valid = rows.valid().view(unit.shape) if rows.padded else None
        return Tokens(unit, frame, self.units, valid, group)

    def _groups(self, rows: Plan, frame: Tensor) -> Tensor:
        """Groups that a merge leaves: twice the frame, and one more for means over several frames."""
        of = self.frame.reshape(-1)[rows.member.long()].long()
        owner = torch.repeat_interleave(
            torch.arange(rows.num_out, device=of.device), rows.offset.diff().long(), output_size=of.shape[0]
        )
        first = torch.full((rows.num_out,), -1, dtype=torch.long, device=of.device)
        low = first.scatter_reduce(0, owner, of, "amin", include_self=False)
        high = first.scatter_reduce(0, owner, of, "amax", include_self=False)
        over = (low != high).view(frame.shape).to(frame.dtype)
        return torch.where(frame < 0, -1, 2 * frame + over)
