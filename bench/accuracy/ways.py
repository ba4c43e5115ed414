"""Plainer ways to leave as many tokens after every block as merging leaves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import vidtok
from vidtok.merge import ToMe
from vidtok.merge.run import Run, Step

WAYS = {
    "tome": "ToMe",
    "tome-plain": "ToMe, no proportional attention",
    "pool": "pooling",
    "pool-sized": "pooling, proportional attention",
    "uniform": "uniform dropping",
    "random": "random dropping",
}


def evenly(tokens: int, keep: int) -> Tensor:
    """``keep`` of ``tokens`` places at equal distances."""
    return (torch.arange(keep) * tokens + tokens // 2) // keep


class _Drop(Step):
    """Some of the patches leave, drawn or at equal distances; the prefix stays."""

    def merge(self, x: Tensor) -> Tensor:
        run: Any = self.run
        r, prefix = run.merges[self.index], run.protected[self.index]
        self.metric = None
        if r > 0:
            batch, tokens = x.shape[0], x.shape[1] - prefix
            if run.way == "random":
                drawn = torch.rand(batch, tokens, generator=run.generator).argsort(-1)[:, : tokens - r].sort(-1).values
            else:
                drawn = evenly(tokens, tokens - r).expand(batch, -1)
            place = torch.cat([torch.arange(prefix).expand(batch, -1), drawn + prefix], 1)
            x = x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
        run.protected[self.index + 1], run.tokens[self.index + 1] = prefix, x.shape[-2]
        return x


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid with pairs of columns pooled, or of rows where there are more of them; an odd one out stays alone."""
    rows, columns = grid
    return (rows, (columns + 1) // 2) if columns >= rows else ((rows + 1) // 2, columns)


class _Pool(Step):
    """Neighbours of the grid become their mean: left and right, then above and below, and so on."""

    def merge(self, x: Tensor) -> Tensor:
        run: Any = self.run
        i, prefix = self.index, run.protected[self.index]
        r, size = run.merges[i], run.size[i]
        self.metric = None
        if r > 0:
            (rows, columns), (fewer, narrower) = run.grid, halved(run.grid)
            if r != rows * columns - fewer * narrower:
                raise ValueError(f"expected {rows * columns - fewer * narrower} patches to be pooled away, got {r}")
            row, column = torch.arange(rows), torch.arange(columns)
            owner = (row // 2 if fewer < rows else row)[:, None] * narrower
            owner = (owner + (column // 2 if narrower < columns else column)).flatten()
            cells = torch.zeros(fewer * narrower).index_add_(0, owner, run.cells)
            share = (run.cells / cells[owner])[:, None]
            pooled = x.new_zeros(x.shape[0], len(cells), x.shape[2]).index_add_(1, owner, x[:, prefix:] * share)
            x = torch.cat([x[:, :prefix], pooled], 1)
            run.grid, run.cells = (fewer, narrower), cells
            if run.way == "pool-sized":
                size = torch.cat([torch.ones(prefix), cells]).expand(x.shape[:2]).contiguous()
        run.size[i + 1], run.protected[i + 1], run.tokens[i + 1] = size, prefix, x.shape[-2]
        return x


class _Run(Run):
    way = ""
    generator: torch.Generator
    grid: tuple[int, int]
    cells: Tensor

    def step(self, index: int) -> Step:
        return (_Pool if self.way.startswith("pool") else _Drop)(self, index)


def divert(run: Run, way: str, generator: torch.Generator, side: int) -> Run:
    """The same counts as ``run`` has, in another way; ``side * side`` patches enter."""
    if not way.startswith("tome"):
        other: Any = run
        other.__class__ = _Run
        other.way, other.generator, other.grid = way, generator, (side, side)
        other.cells = torch.ones(side * side)
    return run


def attach(model: Any, way: str, r: int | list[int], seed: int = 0) -> Any:
    """An attachment that reduces the tokens of a vision transformer in one of the ``WAYS``.

    Args:
        model: a vision transformer of transformers whose patches are a square.
        way: a key of ``WAYS``.
        r: tokens fewer after each block, or a list; merging's own limits hold for all ways.
        seed: of what is drawn.
    """
    handle = vidtok.attach(model, vision=ToMe(r=r, prop_attn=way in ("tome", "pool-sized")))
    generator = torch.Generator().manual_seed(seed)
    side = model.config.image_size // model.config.patch_size

    def begin(first: Any, *args: Any) -> Run:
        return divert(first(*args), way, generator, side)

    for merging in handle.vision:
        merging.begin = partial(begin, merging.begin)
    return handle
