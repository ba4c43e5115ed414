"""How many tokens each layer of a vision tower merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vidtok import _check
from vidtok.ops.bipartite import prefix_merge_count


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def inflected(layers: int, r: int, inflection: float) -> list[int]:
    r"""The published decreasing, constant or increasing schedule.

    :math:`r_l = \lfloor r_{min} + step \cdot l \rfloor` with :math:`r_{min} = \lfloor r (1 - inflection)
    \rfloor`, :math:`r_{max} = 2r - r_{min}` and :math:`step = (r_{max} - r_{min}) / (L - 1)`; truncation
    makes a schedule that is not constant merge fewer tokens than ``layers * r``.

    Source: Bolya et al., Token Merging, ICLR 2023, appendix.

    Example:
        >>> inflected(12, 8, -1)
        [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    """
    low = int(r * (1 - inflection))
    high = 2 * r - low
    step = (high - low) / (layers - 1) if layers > 1 else 0.0
    return [int(low + step * layer) for layer in range(layers)]


@dataclass(frozen=True)
class Schedule:
    """Merges of each layer, by exactly one of ``r``, ``ratio`` and ``k``.

    Args:
        r: merges of every layer; a list with one number for each layer; or ``(r, inflection)`` with an
            inflection from -1 (twice ``r`` in the first layer, none in the last) to 1 (the other way).
        ratio: share of the tokens that are left after the last layer, in (0, 1], spread evenly.
        k: tokens that are left after the last layer instead, protected ones counted.

    Raises:
        ValueError: for none or several of them, or a value outside its range.
    """

    r: Any = None
    ratio: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("r", "ratio", "k") if getattr(self, name) is not None]
        if len(given) != 1:
            _check.fail("one of r, ratio and k", " and ".join(given) or "none of them")
        if self.k is not None and (not _is_int(self.k) or self.k < 1):
            _check.fail("k as an integer of at least 1", repr(self.k))
        if self.ratio is not None and (
            isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1
        ):
            _check.fail("ratio in (0, 1]", repr(self.ratio))
        if self.r is not None:
            self._check_r()

    def _check_r(self) -> None:
        r = self.r
        if isinstance(r, tuple):
            pair = len(r) == 2 and _is_int(r[0]) and isinstance(r[1], int | float) and not isinstance(r[1], bool)
            if not pair or r[0] < 0 or not -1 <= r[1] <= 1:
                _check.fail("r as (merges of at least 0, inflection from -1 to 1)", repr(r))
        elif isinstance(r, list):
            if not r or not all(_is_int(value) and value >= 0 for value in r):
                _check.fail("r as a list of integers of at least 0", repr(r))
            object.__setattr__(self, "r", list(r))
        elif not _is_int(r) or r < 0:
            _check.fail("r as an integer of at least 0, a list with one for each layer, or (r, inflection)", repr(r))

    def wanted(self, layers: int, tokens: int) -> tuple[int, ...]:
        """Merges asked of each layer for a sequence of ``tokens``, before they are clamped."""
        if isinstance(self.r, tuple):
            return tuple(inflected(layers, *self.r))
        if isinstance(self.r, list):
            if len(self.r) != layers:
                _check.fail(f"r with one number for each of the {layers} layers", f"{len(self.r)} numbers")
            return tuple(self.r)
        if self.r is not None:
            return (self.r,) * layers
        away = tokens - self._target(tokens)
        return tuple(away * (layer + 1) // layers - away * layer // layers for layer in range(layers))

    def _target(self, tokens: int) -> int:
        wanted = max(1, int(self.ratio * tokens)) if self.ratio is not None else int(self.k or 1)
        return min(wanted, tokens)

    def counts(self, layers: int, tokens: int, protected: int = 0) -> tuple[int, ...]:
        """Merges that each layer does: at most half of its unprotected tokens.

        With ``ratio`` and ``k`` earlier layers merge more where the later ones, halving what they get, would
        not come down to the target.
        """
        wanted = self.wanted(layers, tokens)
        most = [tokens] * layers
        if self.r is None:
            left = self._target(tokens)
            for layer in reversed(range(layers)):
                most[layer] = left
                left = min(tokens, max(left, 2 * left - protected))
        out, missed = [], 0
        for want, limit in zip(wanted, most, strict=True):
            # What was merged early is not merged again.
            asked = max(want + missed, tokens - limit, 0)
            done = prefix_merge_count(tokens, asked, protected)
            missed = want + missed - done if self.r is None else 0
            out.append(done)
            tokens -= done
        return tuple(out)
