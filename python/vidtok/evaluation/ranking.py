"""Ranks of the right answer where several are right and scores may be equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidtok._check import fail


@dataclass(frozen=True)
class Ranks:
    """Where each query's best right answer stands.

    Args:
        above: wrong answers that score higher, int64 ``[Q]``.
        equal: wrong answers that score the same.
        right: right answers that score the same, at least 1.
    """

    above: Tensor
    equal: Tensor
    right: Tensor

    def expected(self) -> Tensor:
        r"""Rank from 1, float64 ``[Q]``: the mean over all orders of what is equal, :math:`a + (e+t+1)/(t+1)`."""
        return self.above + (self.equal + self.right + 1).double() / (self.right + 1)

    def within(self, k: int) -> Tensor:
        """Probability, float64 ``[Q]``, of a right answer among the first ``k``, what is equal in random order."""
        room = (k - self.above).clamp_min(0)
        missed = torch.ones(len(room), dtype=torch.float64)
        for i in range(k):
            left = (self.equal - i).clamp_min(0).double() / (self.equal + self.right - i).clamp_min(1)
            missed = torch.where(room > i, missed * left, missed)
        return 1 - missed


def count(similarity: Tensor, right: Tensor) -> Ranks:
    """Ranks in rows of ``similarity`` ``[Q, G]``; ``right`` is a bool mask of the same shape.

    Raises:
        ValueError: for scores that are no numbers, or a row without a right answer.
    """
    if torch.isnan(similarity).any():
        fail("similarities that are numbers", f"{int(torch.isnan(similarity).sum())} that are not (NaN)")
    if not right.any(1).all():
        fail("a right answer for every query", "a query without one")
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ties = similarity == best
    return Ranks(((similarity > best) & ~right).sum(1).cpu(), (ties & ~right).sum(1).cpu(), (ties & right).sum(1).cpu())


def join(parts: list[Ranks]) -> Ranks:
    """Ranks of queries one behind another."""
    return Ranks(*(torch.cat([getattr(p, n) for p in parts]) for n in ("above", "equal", "right")))
