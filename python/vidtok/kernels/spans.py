"""Where the spans of attention_topk, their groups and their scores lie; for kernels that read it from lists."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple


class Layout(NamedTuple):
    """Spans with the places of their tokens; groups by first appearance."""

    pieces: list[int]  # row, start, stop, place among the scores, place among the groups, for each span
    offsets: list[int]  # of the groups
    budgets: list[int]
    longest: int
    ordered: bool  # whether the groups' order is the spans' own


@lru_cache(maxsize=256)
def layout(
    rows: tuple[int, ...], group: tuple[int, ...] | None, keep: tuple[int, ...], batch: int, length: int
) -> Layout:
    """Lay out spans ``(row, start, stop, row, start, …)``; raises where they do not fit.

    Raises:
        IndexError: a span outside the keys.
        ValueError: a group whose spans do not ascend in one row, or budgets that do not fit.
    """
    spans = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    for b, lo, hi in spans:
        if not (0 <= b < batch and 0 <= lo <= hi <= length):
            raise IndexError(f"expected spans (row, start, stop) inside [{batch}, {length}], got {(b, lo, hi)}")
    members: dict[int, list[int]] = {}
    for s, g in enumerate(range(len(spans)) if group is None else group):
        members.setdefault(g, []).append(s)
    budgets = list(keep) * len(members) if len(keep) == 1 else list(keep)
    if len(budgets) != len(members):
        raise ValueError(f"expected one keep or one for each of {len(members)} groups, got {len(budgets)}")
    score_at = [0, *accumulate(hi - lo for _, lo, hi in spans)]
    group_at, offsets, at, order = [0] * len(spans), [0], 0, []
    for mine, budget in zip(members.values(), budgets):
        filled = [spans[s] for s in mine if spans[s][1] < spans[s][2]]
        if any(a[2] > b[1] for a, b in zip(filled, filled[1:])) or len({spans[s][0] for s in mine}) > 1:
            raise ValueError(f"expected a group's spans ascending in one row, got {[list(spans[s]) for s in mine]}")
        for s in mine:
            group_at[s], at = at, at + spans[s][2] - spans[s][1]
        order += mine
        if not 0 <= budget <= at - offsets[-1]:
            tokens = at - offsets[-1]
            raise ValueError(f"expected keep between 0 and the group's {tokens} tokens, got {budget}")
        offsets.append(at)
    pieces = [n for s, span in enumerate(spans) for n in (*span, score_at[s], group_at[s])]
    longest = max((hi - lo for _, lo, hi in spans), default=0)
    return Layout(pieces, offsets, budgets, longest, order == sorted(order))
