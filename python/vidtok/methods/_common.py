"""What every method shares: checks of grids and options, counts, and the making of gather plans."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vidtok import _check
from vidtok.plan import Plan, offsets

Grid = tuple[int, int, int]
GridLike = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Method:
    """A method as the spec parser sees it.

    Args:
        name: name in a spec string.
        run: ``run(features, grid_thw, **options) -> Plan``.
        check: raises ValueError or TypeError for options it refuses; called with every option.
        count: output tokens per video from its grid and the options, or None when features decide.
        kinds: type of every option: ``int``, ``float``, ``bool``, ``word``, ``pair`` (two ints) or
            ``schedule`` (an int, a list of ints, or a pair); the order is that of the canonical spec.
        defaults: value of every option that may be left out.
        needs_grid: whether tokens must lie on a (t, h, w) grid.
        out_grid: grid of the output, for methods that give a grid again.
    """

    name: str
    run: Callable[..., Plan]
    check: Callable[..., None]
    count: Callable[..., int | None]
    kinds: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs_grid: bool = True
    out_grid: Callable[..., Grid] | None = None


def grids(grid_thw: GridLike) -> list[Grid]:
    """``grid_thw`` ``[V, 3]`` as a list of (t, h, w), checked."""
    if isinstance(grid_thw, Tensor):
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point() or grid_thw.is_complex():
            _check.fail("grid_thw as integers of shape [V, 3]", grid_thw)
        rows: list[Any] = grid_thw.tolist()
    else:
        rows = list(grid_thw)
    result = []
    for row in rows:
        values = row.tolist() if isinstance(row, Tensor) else row
        try:
            t, h, w = (operator.index(v) for v in values)
        except (TypeError, ValueError):
            _check.fail("grid_thw as rows (t, h, w) of integers", repr(row))
        if t < 0 or h < 1 or w < 1:
            _check.fail("grids (t, h, w) with t ≥ 0, h ≥ 1 and w ≥ 1", repr((t, h, w)))
        result.append((t, h, w))
    return result


def inputs(features: Tensor, grid_thw: GridLike) -> tuple[Tensor, list[Grid]]:
    """Checked and detached features ``[N, C]`` and the grids that cover them."""
    _check.float_tensor(features, "features", "[N, C]")
    found = grids(grid_thw)
    total = sum(t * h * w for t, h, w in found)
    if total != features.shape[0]:
        shown = found if len(found) <= 8 else f"{found[:8]}..."
        _check.fail(f"features of {total} tokens for grid_thw {shown}", f"{features.shape[0]} tokens")
    return features.detach(), found


def tokens(grid: Grid) -> int:
    """Tokens of a grid."""
    t, h, w = grid
    return t * h * w


def check_int(name: str, value: object, low: int) -> None:
    """Refuse anything but an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        _check.fail(f"{name} as an integer ≥ {low}", repr(value))


def check_number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse anything but a finite number in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if math.isfinite(high) else ')'}"
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        _check.fail(f"{name} in {interval}", repr(value))


def check_ratio(name: str, value: object) -> None:
    """Refuse anything but a share kept, in (0, 1]."""
    check_number(name, value, 0, 1, open_low=True)


def check_one_of(**options: object) -> None:
    """Require exactly one of the options to be given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        _check.fail(f"exactly one of {' and '.join(options)}", " and ".join(given) or "none")


def share(ratio: float, n: int) -> int:
    """``max(1, int(ratio · n))``, and 0 of nothing."""
    return min(n, max(1, int(ratio * n)))


def common(lengths: Sequence[int]) -> int | None:
    """The one length that all sequences have, if they have one."""
    return lengths[0] if lengths and all(n == lengths[0] for n in lengths) else None


def gather(index: Tensor, lengths_in: Sequence[int], lengths_out: Sequence[int]) -> Plan:
    """Plan that keeps the packed tokens ``index``, with every count known on the host."""
    return Plan.gather(
        index,
        offsets(lengths_in, index.device),
        offsets(lengths_out, index.device),
        sum(lengths_in),
        length_in=common(lengths_in),
        length_out=common(lengths_out),
    )
