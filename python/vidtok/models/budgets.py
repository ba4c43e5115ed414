"""Which visual tokens share a count, and how many of them stay at each stage of a :class:`Drop`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidtok.models.drop import Drop, uniform
from vidtok.models.tokens import Tokens


@dataclass(frozen=True)
class Groups:
    """The budgets that have tokens at a stage, in order of their first column.

    Args:
        key: number of each budget, as :func:`keys` gives it.
        row: its row.
        current: its tokens present.
        keep: how many of them stay.
        columns: int64 ``[Σ current]``, their packed row columns, budget by budget, ascending.
        span: (row, start, stop) of runs of neighbouring tokens of one budget, ascending.
        group: place in ``key`` of each run's budget.
    """

    key: list[int]
    row: list[int]
    current: list[int]
    keep: list[int]
    columns: Tensor
    span: list[tuple[int, int, int]]
    group: list[int]


@dataclass(frozen=True)
class Kept:
    """Outcome of a stage: bool ``[B, L]``, False for the visual tokens that leave, and how many leave each row."""

    mask: Tensor
    dropped: list[int]


def keys(drop: Drop, tokens: Tokens, group: Tensor | None = None) -> Tensor:
    """int64 ``[B, L]``: number of the budget of each visual token, −1 for text and padding.

    Args:
        group: ``[B, L]``, number of each visual token's group inside its unit, for ``budget="group"``;
            frames when None.
    """
    unit = tokens.unit.long()
    if drop.budget == "item":
        return unit
    if drop.budget == "sample":
        row = torch.arange(unit.shape[0], device=unit.device)[:, None]
        return torch.where(unit >= 0, row, -1)
    part = tokens.frame if drop.budget == "frame" or group is None else group
    width = 1 << 31
    return torch.where(unit >= 0, unit * width + part.long(), -1)


def originals(key: Tensor) -> dict[int, int]:
    """Tokens of each budget as they enter the decoder."""
    number, count = torch.unique(key[key >= 0], return_counts=True)
    return dict(zip(number.tolist(), count.tolist()))


def groups(drop: Drop, stage: int, key: Tensor, original: dict[int, int]) -> Groups:
    """The budgets that are present before a stage.

    Args:
        key: of the columns present, ``[B, L]``.
        original: of :func:`originals`, when the decoder was entered.
    """
    batch, length = key.shape
    edge = torch.ones(batch, 1, dtype=torch.bool, device=key.device)
    starts = torch.cat([edge, key[:, 1:] != key[:, :-1]], 1).reshape(-1).nonzero().squeeze(1)
    runs = zip(starts.tolist(), [*starts[1:].tolist(), batch * length], key.reshape(-1)[starts].tolist())
    order: dict[int, int] = {}
    row: list[int] = []
    current: list[int] = []
    span: list[tuple[int, int, int]] = []
    member: list[int] = []
    for start, stop, number in runs:
        if number < 0:
            continue
        place = order.setdefault(number, len(order))
        if place == len(current):
            current.append(0)
            row.append(start // length)
        current[place] += stop - start
        span.append((row[place], start - row[place] * length, stop - row[place] * length))
        member.append(place)
    keep = [drop.keep(stage, original[k], n) for k, n in zip(order, current)]
    columns = _columns(key, span, member, len(order), length)
    return Groups(list(order), row, current, keep, columns, span, member)


def _columns(key: Tensor, span: list[tuple[int, int, int]], member: list[int], count: int, length: int) -> Tensor:
    if len(span) == count:  # one run each: their order is that of the columns
        return (key.reshape(-1) >= 0).nonzero().squeeze(1)
    by_group = sorted(range(len(span)), key=member.__getitem__)
    sizes = torch.tensor([span[s][2] - span[s][1] for s in by_group])
    start = torch.tensor([span[s][0] * length + span[s][1] for s in by_group])
    first = torch.repeat_interleave(start - (sizes.cumsum(0) - sizes), sizes)
    return (first + torch.arange(first.shape[0])).to(key.device)


def keep_uniform(chosen: Groups, key: Tensor) -> Kept:
    """Keep tokens of each budget at regular places."""
    places: list[int] = []
    start = 0
    for current, keep in zip(chosen.current, chosen.keep):
        places += [start + i for i in uniform(current, keep)]
        start += current
    return keep_columns(chosen, key, chosen.columns[torch.tensor(places, dtype=torch.int64, device=key.device)])


def keep_columns(chosen: Groups, key: Tensor, columns: Tensor) -> Kept:
    """Keep the visual tokens of these packed row columns."""
    mask = key < 0
    mask.view(-1)[columns] = True
    dropped = [0] * key.shape[0]
    for row, current, keep in zip(chosen.row, chosen.current, chosen.keep):
        dropped[row] += current - keep
    return Kept(mask, dropped)
