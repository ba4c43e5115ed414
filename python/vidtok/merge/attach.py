"""Token merging in any vision tower."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.block import Halves, merging_class, swap
from vidtok.merge.options import ToMe
from vidtok.merge.run import Run, unmerge
from vidtok.merge.spec import resolve
from vidtok.plan import Plan


class Merging:
    """Token merging in one tower: ``restore()`` takes it out; also a context manager.

    Args:
        tower: the module that holds the blocks, for messages.
        blocks: in the order in which they run.
        halves: how a block is written.
        options: what to merge.
        prefix: class, register and prompt tokens at the start of a sequence.
        full_length: whether the last block gives every token back.
    """

    def __init__(
        self,
        tower: nn.Module,
        blocks: Sequence[nn.Module],
        halves: Halves,
        options: ToMe,
        prefix: int = 0,
        full_length: bool = False,
    ) -> None:
        for block in blocks:
            if "_vidtok" in vars(block) or type(block) is merging_class(type(block).__bases__[0]):
                raise ValueError(
                    f"expected a {type(tower).__name__} without token merging, got one with it; restore() it first"
                )
        self.tower, self.halves, self.options, self.prefix = tower, halves, options, prefix
        self.full_length, self.layers = full_length, len(blocks)
        options.schedule.wanted(self.layers, 0)
        #: The run that is under way or was the last one.
        self.run: Run | None = None
        _forget_compiled()
        self._back: list[Callable[[], None]] = [swap(block, self, i) for i, block in enumerate(blocks)]

    @property
    def active(self) -> bool:
        """Whether the merging is in place."""
        return bool(self._back)

    # ------------------------------------------------------------------ the forward pass
    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """The run that a block's call belongs to; the first block begins one."""
        if index == 0:
            self.run = self.begin(args[0] if args else kwargs["hidden_states"])
        return self.run

    def begin(self, x: Tensor) -> Run:
        """The run of a pass whose first block gets ``x`` ``[B, T, C]``."""
        batch, tokens = x.shape[0], x.shape[-2]
        own, keep = self.options.protected, self.options.trace or self.full_length
        protected: int | Tensor
        if isinstance(own, Tensor):
            if own.dtype != torch.bool or tuple(own.shape) not in ((tokens,), (batch, tokens)):
                _check.fail(f"protected of bool [{tokens}] or [{batch}, {tokens}]", own)
            count = max(self.prefix, int(own.sum(-1).max()))
            protected = own.to(x.device).expand(batch, tokens).clone()
            protected[:, : self.prefix] = True
        else:
            count = protected = min(self.prefix + own, tokens)
        run = Run(self.options, self.options.schedule.counts(self.layers, tokens, count), protected, keep)
        run.tokens[0] = tokens
        return run

    def forward(self, block: nn.Module, run: Run, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = run.step(index)
        if not args:
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        # Blocks of older libraries return a tuple, whose first entry is the tokens.
        out = self.halves.attend(block, args[0], step, *args[1:], **kwargs)
        x, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        x = self.halves.feed(block, step.merge(x))
        if self.full_length and index == self.layers - 1:
            x = unmerge(run.plan(), x)
        return x if rest is None else (x, *rest)

    # ------------------------------------------------------------------ afterwards
    @property
    def size(self) -> Tensor | None:
        """fp32 ``[B, T']``: how many tokens each one stands for after the last block of the last pass."""
        return None if self.run is None else self.run.size[-1]

    def trace(self, stop: int | None = None) -> Plan | None:
        """The plan from the tokens of the tower to those after block ``stop`` (all of them), with ``trace=True``."""
        if not (self.options.trace or self.full_length):
            _check.fail("an attachment with trace=true", str(self.options))
        return None if self.run is None else self.run.plan(stop=stop)

    def unmerge(self, y: Tensor) -> Tensor:
        """``[B, T', C]`` of the last pass, a copy for every token that was merged, ``[B, T, C]``."""
        return unmerge(self.trace(), y)

    def restore(self) -> None:
        """Take the merging out; the model is as before. A second call does nothing."""
        if self._back:
            _forget_compiled()
        while self._back:
            self._back.pop()()

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<vidtok merging {str(self.options)!r}{'' if self.active else ', restored'}>"


def _forget_compiled() -> None:
    """Drop compiled code, which may have been made for the classes that the blocks had."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if getattr(frames, "FRAME_COUNTER", 0):
        torch.compiler.reset()


def attach_any(
    module: nn.Module,
    merge: str | ToMe,
    *,
    blocks: str | Sequence[nn.Module] = "blocks",
    halves: Halves,
    protected: int = 1,
    full_length: bool = False,
) -> Merging:
    """Merge tokens in a tower that vidtok does not know.

    Args:
        module: the tower.
        merge: ``"tome:r=8"`` or a :class:`vidtok.merge.ToMe`.
        blocks: its blocks in order, or the dotted name of the list that holds them.
        halves: an object with ``attend(block, x, step, *args, **kwargs)`` and ``feed(block, x)``: the block's
            attention half and its MLP half, residuals added. ``attend`` calls ``step.attention(q, k, v)`` with
            ``[B, H, T, D]`` in place of ``scaled_dot_product_attention``; ``args`` are the block's own.
        protected: tokens at the start of a sequence that never merge.
        full_length: give every token back after the last block.

    Returns:
        A :class:`Merging`: ``restore()``, ``size``, ``trace()``, ``unmerge()``; also a context manager.

    Raises:
        ValueError: a module without these blocks, halves without these methods, options that do not fit.
    """
    found: Any = blocks
    if isinstance(blocks, str):
        found = module
        for name in blocks.split("."):
            found = getattr(found, name, None)
            if found is None:
                _check.fail(f"{type(module).__name__} to have blocks at {blocks!r}", f"none ({name!r} is missing)")
    for name in ("attend", "feed"):
        if not callable(getattr(halves, name, None)):
            _check.fail("halves with the methods attend and feed", f"{type(halves).__name__} without {name}")
    return Merging(module, list(found), halves, resolve(merge), protected, full_length)
