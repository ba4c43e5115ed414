r"""What merging did to a vision tower, in tokens and floating-point operations.

A block whose attention computes :math:`n` tokens in sequences of lengths :math:`L`, and whose MLP then gets
:math:`m`, costs

.. math:: 2 n P_a + 4 w \sum L^2 + 2 m P_m + 2 d \sum \lceil l/2 \rceil \lfloor l/2 \rfloor

with :math:`P_a` and :math:`P_m` weights of its attention and of the rest, and width :math:`w`, as
:mod:`vidtok.models.cost` counts them for decoder layers; the last sum, over the segments of :math:`l` tokens in which
tokens merge, is the comparison of their metric of :math:`d` numbers. Patch embedding, heads and patch mergers, which
merging does not change, are left out, and so are norms, activations, rotations and softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from vidtok.merge.attach import Merging
from vidtok.merge.clips import FrameRun
from vidtok.merge.packed import PackedRun
from vidtok.models.cost import _attention, _weights
from vidtok.models.report import Span, _flops


@dataclass(frozen=True)
class Block:
    """One block of a tower in its last pass.

    Args:
        index: 0-based.
        tokens: tokens that its attention computed, of all sequences.
        merged: tokens that entered its MLP.
        flops: operations of its forward pass, by the formula of this module.
        flops_whole: the same without merging.
    """

    index: int
    tokens: int
    merged: int
    flops: int
    flops_whole: int


@dataclass(frozen=True)
class Tower:
    """The last pass of a tower with merging tokens; a model that calls its tower twice (images, videos) shows the last.

    Args:
        name: class of the tower.
        spec: what merges.
        tokens: tokens that entered the first block, of all sequences.
        blocks: one per block that ran; a tower may stop early.
        seconds: time of the whole tower, None where it was not measured (compiled).
    """

    name: str
    spec: str
    tokens: int
    blocks: tuple[Block, ...]
    seconds: float | None

    @property
    def flops(self) -> int:
        """Operations of all blocks."""
        return sum(block.flops for block in self.blocks)

    @property
    def flops_whole(self) -> int:
        """The same without merging."""
        return sum(block.flops_whole for block in self.blocks)

    @property
    def flops_removed(self) -> int:
        """Operations that merging took away, its own counted."""
        return self.flops_whole - self.flops

    def __str__(self) -> str:
        counts = [str(block.merged) for block in self.blocks]
        share = self.flops / self.flops_whole if self.flops_whole else 1.0
        time = "" if self.seconds is None else f", {1e3 * self.seconds:.1f} ms"
        return (
            f"{self.name} ({self.spec}): {self.tokens} tokens, in the MLPs {' '.join(counts)}; "
            f"{_flops(self.flops)} of {_flops(self.flops_whole)} ({share:.0%}){time}"
        )


def timed(tower: nn.Module, merging: Merging) -> Callable[[], None]:
    """Measure each pass of ``tower``; the result takes that back."""
    from vidtok.models.towers._full import _Hook

    begun: list[Span] = []

    def before(module: nn.Module, args: Any) -> None:
        begun.clear()
        if not torch.compiler.is_compiling():
            begun.append(Span(next(module.parameters()).device))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        merging.span = begun.pop().stop() if begun else None

    handles = [tower.register_forward_pre_hook(_Hook(before)), tower.register_forward_hook(_Hook(after))]

    def back() -> None:
        for handle in handles:
            handle.remove()

    return back


def towers(merges: Sequence[Merging]) -> tuple[Tower, ...]:
    """The last pass of every tower that has run."""
    return tuple(_tower(merging) for merging in merges if merging.run is not None)


def _tower(merging: Merging) -> Tower:
    run: Any = merging.run
    blocks, first = [], 0
    for i, block in enumerate(merging.blocks[: run.next]):
        attended, whole, compared, left = _sequences(run, i)
        part = _attention(block)
        own, every = _weights(part, None)[0], _weights(block, None)[0]
        heads = next((int(v) for v in (getattr(part, n, None) for n in ("num_heads", "num_attention_heads")) if v), 1)
        width = _width(block)
        inner = width if merging.options.metric == "hidden" else width // heads
        blocks.append(
            Block(
                i,
                sum(attended),
                left,
                2 * sum(attended) * own
                + 4 * width * sum(n * n for n in attended)
                + 2 * left * (every - own)
                + 2 * inner * sum((n + 1) // 2 * (n // 2) for n in compared),
                2 * sum(whole) * every + 4 * width * sum(n * n for n in whole),
            )
        )
        first = first or sum(whole)
    seconds = None if merging.span is None else merging.span.seconds()
    return Tower(type(merging.tower).__name__, str(merging.options), first, tuple(blocks), seconds)


def _width(block: nn.Module) -> int:
    """Channels of a block's tokens: as its first norm has them."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 1:
            return weight.shape[0]
    return next(p.shape[-1] for p in block.parameters() if p.ndim > 1)


def _sequences(run: Any, index: int) -> tuple[list[int], list[int], list[int], int]:
    """Lengths in a block's attention, the same without merging, those in which tokens merge, and all in its MLP."""
    if isinstance(run, PackedRun):
        whole = run.attended[index]
        now = [run.borders[index][run.number[border]] for border in whole]
        segments = [b - a for (a, b), r in zip(pairwise(run.borders[index]), run.counts[index], strict=True) if r]
        return _lengths(now), _lengths(whole), segments, run.borders[index + 1][-1]
    if isinstance(run, FrameRun):
        level, first = run.levels[index], run.levels[0]
        videos = 1 if isinstance(first.clips, tuple) else max(1, run.batch // first.clips)
        count = level.clips_out * videos if isinstance(level.clips_out, int) else sum(level.clips_out)
        segments = [level.joined] * count if level.cross else []
        segments += [level.attended] * count if level.intra else []
        return [level.attended] * count, [first.tokens] * run.batch, segments, level.tokens_out * count
    tokens, batch = run.tokens, run.batch
    compared = [tokens[index]] * batch if run.merges[index] else []
    return [tokens[index]] * batch, [tokens[0]] * batch, compared, tokens[index + 1] * batch


def _lengths(borders: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(borders)]
