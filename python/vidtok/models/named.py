"""Visual tokens that the caller names, for language models that are given embeddings or ids of their own making."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.models.families._base import Media, Visual
from vidtok.models.families._runs import frame_units, square
from vidtok.models.report import Unit

Span = tuple[int, int, int]


class Named:
    """What the caller says about the columns of its rows, in this thread.

    Args:
        token: id whose stretches in ``input_ids`` are visual tokens; None for none.
    """

    def __init__(self, token: int | None = None) -> None:
        self.token = token
        self._local = threading.local()
        self._rule = frame_units()

    def _stack(self) -> list[tuple[list[Span], list[int], int]]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    @contextmanager
    def use(self, where: Sequence[Span] | Tensor, frames: int | Sequence[int] = 1) -> Iterator[None]:
        """Name the visual tokens of the calls inside the block."""
        spans, batch = _spans(where)
        counts = [frames] * len(spans) if isinstance(frames, int) else [int(n) for n in frames]
        if len(counts) != len(spans):
            _check.fail(f"frames for {len(spans)} stretches of visual tokens", str(len(counts)))
        for (row, start, stop), n in zip(spans, counts):
            if n < 1 or (stop - start) % n:
                _check.fail(
                    f"frames of equal size in the {stop - start} tokens of columns {start} to {stop} of row {row}",
                    f"{n} frames",
                )
        self._stack().append((spans, counts, batch))
        try:
            yield
        finally:
            self._stack().pop()

    def active(self) -> bool:
        """Whether the caller named anything."""
        return self.token is not None or bool(self._stack())

    def find(self, module: Any, arguments: dict[str, Any], start: int, borders: tuple[int, ...] = ()) -> Visual | None:
        """The named tokens among the columns of a pass, which the caller counts from ``start``.

        Raises:
            ValueError: a stretch that lies outside the rows, or only partly in this pass.
        """
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = ids if ids is not None else embeds
        assert given is not None
        batch, length = given.shape[:2]
        if not self._stack():
            # A token of a decoding step was chosen by the model, not given.
            return None if start and length == 1 else self._stretches(module, arguments, ids, length, borders)
        spans, counts, rows = self._stack()[-1]
        beams = batch // rows if rows and batch % rows == 0 else 1
        found: list[tuple[int, int, Unit]] = []
        for (row, first, stop), n in zip(spans, counts):
            if stop <= start or first >= start + length:
                continue
            if first < start or stop > start + length:
                _check.fail(
                    f"columns {first} to {stop} of row {row} in one pass, as prefill_chunk_size does not give them",
                    f"columns {start} to {start + length}",
                )
            if row * beams >= batch:
                _check.fail(f"visual tokens in rows 0 to {batch // beams - 1}", f"row {row}")
            unit = (n, *square((stop - first) // n))
            for k in range(row * beams, (row + 1) * beams):
                found.append((k * length + first - start, stop - first, Unit("video", k, unit)))
        if not found:
            return None
        found.sort(key=lambda item: item[0])
        columns = torch.cat([torch.arange(at, at + n, device=given.device) for at, n, _ in found])
        return Visual(columns, [unit for _, _, unit in found], [n for _, n, _ in found])

    def _stretches(
        self, module: Any, arguments: dict[str, Any], ids: Tensor | None, length: int, borders: tuple[int, ...]
    ) -> Visual | None:
        if ids is None or self.token is None:
            return None
        columns = torch.nonzero((ids == self.token).reshape(-1)).squeeze(1)
        parts = self._rule(Media(module, "video", columns, length, arguments, borders=borders))
        if not parts:
            return None
        starts = torch.stack([part[0] for part, _ in parts]).tolist()
        units = [Unit("video", s // length, grid) for s, (_, grid) in zip(starts, parts)]
        return Visual(torch.cat([part for part, _ in parts]), units, [part.numel() for part, _ in parts])


def _spans(where: Sequence[Span] | Tensor) -> tuple[list[Span], int]:
    """Stretches in order, and the number of rows (of a list: up to the last that is named)."""
    if isinstance(where, Tensor):
        if where.dim() != 2 or where.dtype != torch.bool:
            _check.fail("a bool mask of shape [B, L]", f"{where.dtype} of shape {list(where.shape)}")
        edge = torch.nn.functional.pad(where.int(), (1, 1)).diff(dim=1).cpu()
        starts, stops = (edge == 1).nonzero().tolist(), (edge == -1).nonzero().tolist()
        return [(row, a, b) for (row, a), (_, b) in zip(starts, stops)], where.shape[0]
    spans = sorted((int(row), int(start), int(stop)) for row, start, stop in where)
    for i, (row, start, stop) in enumerate(spans):
        if row < 0 or start < 0 or stop <= start:
            _check.fail("stretches (row, start, stop) with 0 <= start < stop", str((row, start, stop)))
        if i and spans[i - 1][0] == row and spans[i - 1][2] > start:
            _check.fail("stretches that do not overlap", f"{spans[i - 1]} and {(row, start, stop)}")
    return spans, 0
