"""One forward pass of a tower in which the clips of videos join."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from vidtok import ops
from vidtok.merge.run import Run, Step, unmerge
from vidtok.merge.tempme import Clips, Level, TempMe
from vidtok.plan import Plan, offsets

#: Size of the tokens that a last, smaller clip is filled up with: nothing beside 1, and not 0, whose logarithm is none.
FILL = 2.0**-120


class FrameRun(Run):
    """One forward pass over videos."""

    options: Any

    def __init__(self, options: TempMe, levels: tuple[Level, ...], frames: Clips, keep: bool) -> None:
        super().__init__(cast(Any, options), tuple(level.intra for level in levels), levels[0].prefix, keep)
        self.levels, self.frames = levels, frames
        self.protected = [*(level.prefix for level in levels), levels[-1].prefix]
        #: Sizes after the join of each block, and the plan of join and merging there.
        self.joined: list[Tensor | None] = [None] * len(levels)
        self.entered: list[Plan | None] = [None] * len(levels)
        #: Whether clips are filled up at the entry of each block, from the first that has to on.
        self.filled: list[bool] = list(accumulate(map(_missing, levels), operator.or_))

    def step(self, index: int) -> FrameStep:
        return FrameStep(self, index)

    def full(self, index: int, x: Tensor) -> Tensor:
        """What enters block ``index`` at the tokens of every frame, ``[videos * frames, T, C]``."""
        plan, tokens = self.plan(stop=index), self.tokens[0]
        if plan is None or tuple(x.shape[:2]) == (self.batch, tokens):
            return x
        return unmerge(plan, x.flatten(0, 1)).view(-1, tokens, x.shape[-1])

    def by_video(self, plan: Plan, tokens: tuple[int, int], clips: tuple[Clips, Clips], videos: int) -> Plan:
        """``plan`` with a video as a sequence: ``clips`` of ``tokens`` each come in and go out."""
        (cu_in, length_in), (cu_out, length_out) = (
            _borders(c, n, videos, plan.device) for c, n in zip(clips, tokens, strict=True)
        )
        return replace(plan, cu_seqlens_in=cu_in, cu_seqlens_out=cu_out, length_in=length_in, length_out=length_out)


def _missing(level: Level) -> bool:
    clips = (level.clips,) if isinstance(level.clips, int) else level.clips
    return any(count % level.join for count in clips)


def _borders(clips: Clips, tokens: int, videos: int, device: torch.device) -> tuple[Tensor, int | None]:
    if isinstance(clips, int):
        step = clips * tokens
        return torch.arange(0, (videos + 1) * step, step, dtype=torch.int32, device=device), step
    return offsets([count * tokens for count in clips], device), None


def _rows(level: Level) -> tuple[list[int], list[bool], list[int]]:
    """Of each place in the joined clips of videos of different lengths: its clip, whether it is a copy, its number."""
    assert not isinstance(level.clips, int)
    rows, copies, numbers, base = [], [], [], 0
    for count in level.clips:
        for place in range(-(-count // level.join) * level.join):
            number = min(place, count - 1)
            rows.append(base + number)
            copies.append(place >= count)
            numbers.append(number)
        base += count
    return rows, copies, numbers


def _group(x: Tensor, level: Level, fill: float | None = None) -> Tensor:
    """``[clips, n, ...]`` as ``[joined clips, M, n, ...]``; where a clip is missing the last again, or ``fill``."""
    tail = x.shape[1:]
    if not isinstance(level.clips, int):
        rows, copies, _ = _rows(level)
        x = x.index_select(0, torch.tensor(rows, device=x.device))
        if any(copies):
            copied = torch.tensor(copies, device=x.device).view(-1, *[1] * len(tail))
            x = torch.where(copied, x.detach() if fill is None else fill, x)
        return x.view(-1, level.join, *tail)
    missing = -level.clips % level.join
    if missing:
        x = x.reshape(-1, level.clips, *tail)
        last = x[:, -1:].detach() if fill is None else torch.full_like(x[:, -1:], fill)
        x = torch.cat([x, last.expand(-1, missing, *[-1] * len(tail))], 1)
    return x.reshape(-1, level.join, *tail)


def _flat(x: Tensor, prefix: int) -> Tensor:
    """``[G, M, n, ...]`` as ``[G, M n, ...]``, the first ``prefix`` of each of the M in front."""
    if not prefix:
        return x.flatten(1, 2)
    return torch.cat([x[:, :, :prefix].flatten(1, 2), x[:, :, prefix:].flatten(1, 2)], 1)


class FrameStep(Step):
    """One block of a :class:`FrameRun`: clips join before its attention half."""

    __slots__ = ()
    run: FrameRun

    @property
    def level(self) -> Level:
        return self.run.levels[self.index]

    @property
    def size(self) -> Tensor | None:
        return self.run.joined[self.index]

    def join(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """``[clips, n, C]`` joined, and merged across the clips."""
        run, i, level = self.run, self.index, self.level
        size, plan = run.size[i], None
        if level.join > 1:
            own = level.prefix // level.join
            before, grouped = x.shape[0], _group(x, level)
            if size is None and run.filled[i]:
                size = torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
            if size is not None:
                size = _flat(_group(size, level, FILL), own)
            x = metric = _flat(grouped, own)
            if positions is not None and level.cross:
                x = _flat(grouped + _places(positions, level, grouped), own)
            if run.keep_plans:
                plan = self._joining(before, x.device, own)
            if level.cross:
                x, size, merging = ops.bipartite_merge(x, metric, level.cross, size=size, protected=level.prefix)
                if plan is not None:
                    plan = plan.compose(self._by_video(merging, level.joined, level.attended, x), partition=True)
        run.joined[i], run.entered[i] = size, plan
        return x

    def _joining(self, rows: int, device: torch.device, own: int) -> Plan:
        """Where each token of the joined clips comes from; -1 where a clip is filled up."""
        level = self.level
        index = torch.arange(rows * level.tokens, dtype=torch.int32, device=device).view(rows, level.tokens)
        index = _flat(_group(index, level, -1), own).reshape(-1)
        here = torch.zeros(2, dtype=torch.int32, device=device)
        plan = Plan(here, here, index, None, None, None, rows * level.tokens, padded=self.run.filled[self.index])
        videos = _videos(level.clips, rows)
        return self.run.by_video(plan, (level.tokens, level.joined), (level.clips, level.clips_out), videos)

    def _by_video(self, plan: Plan, before: int, after: int, x: Tensor) -> Plan:
        clips = self.level.clips_out
        return self.run.by_video(plan, (before, after), (clips, clips), _videos(clips, x.shape[0]))

    def weights(self, keys: Tensor) -> Tensor | None:
        """As :meth:`Step.weights`; what clips are filled up with weighs nothing in any case."""
        size, own = super().weights(keys), self.size
        if size is None and own is not None and self.run.filled[self.index]:
            return own.clamp(max=1.0)
        return size

    def merge(self, x: Tensor) -> Tensor:
        """``[clips, n, C]`` with its most similar pairs merged."""
        run, i, level = self.run, self.index, self.level
        size, plan = run.joined[i], run.entered[i]
        if level.intra:
            metric = x if self.metric is None else self.metric
            self.metric = None
            x, size, merging = ops.bipartite_merge(x, metric, level.intra, size=size, protected=level.prefix)
            if run.keep_plans:
                merging = self._by_video(merging, level.attended, level.tokens_out, x)
                plan = merging if plan is None else plan.compose(merging, partition=True)
        run.size[i + 1], run.plans[i], run.tokens[i + 1] = size, plan, x.shape[-2]
        return x


def _videos(clips: Clips, rows: int) -> int:
    return rows // clips if isinstance(clips, int) else len(clips)


def _places(positions: Tensor, level: Level, x: Tensor) -> Tensor:
    """The vectors of the clips in ``x`` ``[G, M, n, C]``, ``[G, M, 1, C]``."""
    clips = level.clips
    if isinstance(clips, int):
        # What fills up the last clip is a copy of it in everything.
        full = clips + -clips % level.join
        own = positions.to(x.dtype)[torch.arange(full, device=x.device).clamp(max=clips - 1)]
        own = own.expand(x.shape[0] * level.join // full, *own.shape)
    else:
        own = positions.to(x.dtype)[torch.tensor(_rows(level)[2], device=x.device)]
    return own.reshape(x.shape[0], level.join, 1, x.shape[-1])
