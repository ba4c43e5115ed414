"""Token merging in any vision tower."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.block import Halves, swap
from vidtok.merge.options import ToMe
from vidtok.merge.recompute import recall, recomputing, remember
from vidtok.merge.run import Run, unmerge
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
        if len(set(map(id, blocks))) < len(blocks):
            twice = next(i for i, block in enumerate(blocks) if any(block is other for other in blocks[:i]))
            raise ValueError(
                f"expected every block of {type(tower).__name__} once, got the {type(blocks[twice]).__name__} at "
                f"{twice} a second time"
            )
        for block in blocks:
            if "_vidtok" in vars(block):
                raise ValueError(
                    f"expected a {type(tower).__name__} without token merging, got one with it; restore() it first"
                )
        self.tower, self.halves, self.options, self.prefix = tower, halves, options, prefix
        self.full_length, self.layers = full_length, len(blocks)
        options.schedule.wanted(self.layers, 0)
        #: The run that is under way or was the last one.
        self.run: Run | None = None
        self._again: Run | None = None
        #: How long the last pass took, where something measures it.
        self.span: Any = None
        self.blocks = list(blocks)
        _forget_compiled()
        self._back: list[Callable[[], None]] = []
        try:
            for i, block in enumerate(blocks):
                self._back.append(swap(block, self, i))
        except BaseException:
            self.restore()
            raise

    @property
    def active(self) -> bool:
        """Whether the merging is in place."""
        return bool(self._back)

    # ------------------------------------------------------------------ the forward pass
    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """The run that a block's call belongs to; the first block begins one."""
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            _check.fail(f"a block of {type(self.tower).__name__} to be called with its tokens first", repr(x)[:60])
        if recomputing():
            # A checkpoint over several blocks keeps the tokens of the first alone.
            run = recall(x, self)
            if run is None:
                run = self.begin(x, self._real(args, kwargs)) if index == 0 else self._again or self.run
            if run is None:
                raise ValueError(self._order(index, "without a forward pass"))
            self._again = run
            return run
        self._again = None
        if index == 0:
            self.run = self.begin(x, self._real(args, kwargs))
            self.run.batch = x.shape[0]
        run = self.run
        if run is None or run.next != index:
            raise ValueError(self._order(index, "first" if run is None or not run.next else f"after {run.next - 1}"))
        run.next = index + 1
        # The first also under no_grad: so it is inside a reentrant checkpoint.
        run.trained = run.trained or x.requires_grad or self.blocks[index].training
        remember(x, self, run)
        return run

    def _order(self, index: int, got: str) -> str:
        return f"expected block {index} of {type(self.tower).__name__} to run after block {index - 1}, got it {got}"

    def _real(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        real = getattr(self.halves, "real", None)
        return None if real is None else real(*args, **kwargs)

    def begin(self, x: Tensor, real: Tensor | None = None) -> Run:
        """The run of a pass whose first block gets ``x`` ``[B, T, C]``; bool ``real`` ``[B, T]`` is no padding."""
        if x.dim() != 3:
            _check.fail(f"blocks of {type(self.tower).__name__} to get tokens [B, T, C]", x)
        # A number, also in compiled code: the merges of many blocks as an expression of a symbol are too much for it.
        batch, tokens = x.shape[0], len(range(x.shape[-2]))
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
        if real is not None and not real.all():
            # What is padded neither goes nor takes in; the shortest row says how many merge.
            if isinstance(protected, int):
                protected = torch.arange(tokens, device=x.device).lt(protected).expand(batch, tokens)
            protected = protected | ~real
            count = int(protected.sum(-1).max())
        follow = real is not None or getattr(self.halves, "follow", False)
        run = Run(self.options, self.options.schedule.counts(self.layers, tokens, count), protected, keep, follow)
        run.tokens[0] = tokens
        return run

    def forward(self, block: nn.Module, run: Run, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = run.step(index)
        # Blocks of older libraries return a tuple, whose first entry is the tokens.
        out = self.halves.attend(block, args[0], step, *args[1:], **kwargs)
        x, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        if not isinstance(x, Tensor) or x.shape != args[0].shape:
            _check.fail(f"attend of {type(block).__name__} {index} to give tokens {list(args[0].shape)} back", x)
        if step.silent:
            raise ValueError(
                f"expected the attention half of {type(block).__name__} {index} to call step.attention(q, k, v), "
                "got a pass without it"
            )
        x = self.halves.feed(block, step.merge(x))
        if index == self.layers - 1:
            x = self.leave(run, x)
        return x if rest is None else (x, *rest)

    def leave(self, run: Run, x: Tensor) -> Tensor:
        """What the tower gives of what comes out of the last block."""
        return unmerge(run.plan(), x) if self.full_length else x

    # ------------------------------------------------------------------ afterwards
    @property
    def size(self) -> Tensor | None:
        """fp32 ``[B, T']``: how many tokens each one stands for after the last block that ran in the last pass."""
        return None if self.run is None else self.run.size[self.run.next]

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
