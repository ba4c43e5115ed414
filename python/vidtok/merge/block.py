"""Blocks whose tokens merge between their two halves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from vidtok.merge.instance import plain, redirect
from vidtok.merge.run import Run, Step

if TYPE_CHECKING:
    from vidtok.merge.attach import Merging


class Halves(Protocol):
    """How a block of a tower is written: tokens merge between ``attend`` and ``feed``."""

    def attend(self, block: nn.Module, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Tensor:
        """What comes out of the attention half, the residual added; ``args`` are the block's further ones."""

    def feed(self, block: nn.Module, x: Tensor) -> Tensor:
        """What comes out of the MLP half, the residual added."""


class Slot:
    """A block's place in its tower. It stays with its module: copies and pickles of the module have none."""

    def __init__(self, owner: Merging, index: int, tokens: str) -> None:
        self.owner, self.index, self.tokens = owner, index, tokens

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with the tokens as its first positional argument."""
        if args or self.tokens not in kwargs:
            return args, kwargs
        return (kwargs[self.tokens],), {key: value for key, value in kwargs.items() if key != self.tokens}


def _empty(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


@functools.cache
def merging_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the block class ``kind`` whose forward merges; it adds no parameter and no buffer."""

    class Merged(kind):  # type: ignore[misc, valid-type]
        _vidtok_kind = kind

        # The run travels in the arguments, so that a checkpoint's recomputation meets the one it belongs to.
        def __call__(self, *args: Any, vidtok_run: Run | None = None, **kwargs: Any) -> Any:
            slot: Slot | None = getattr(self, "_vidtok", None)
            if slot is None:
                return super().__call__(*args, **kwargs)
            args, kwargs = slot.positional(args, kwargs)
            run = slot.owner.enter(slot.index, args, kwargs) if vidtok_run is None else vidtok_run
            return super().__call__(*args, vidtok_run=run, **kwargs)

        @functools.wraps(kind.forward)
        def forward(self, *args: Any, vidtok_run: Run | None = None, **kwargs: Any) -> Any:
            slot: Slot | None = getattr(self, "_vidtok", None)
            if slot is None:
                return super().forward(*args, **kwargs)
            args, kwargs = slot.positional(args, kwargs)
            run = slot.owner.enter(slot.index, args, kwargs) if vidtok_run is None else vidtok_run
            return slot.owner.forward(self, run, slot.index, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Copies and pickles are of the class underneath.
            state = {key: value for key, value in vars(self).items() if key != "_vidtok"}
            return _empty, (kind,), plain(state, self, Merged, kind)

    Merged.__name__, Merged.__qualname__, Merged.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Merged


def swap(block: Any, owner: Merging, index: int) -> Callable[[], None]:
    """Let ``block`` merge; the result takes that back."""
    kind: Any = type(block)
    # The first parameter of a forward is its tokens; many libraries call it hidden_states and pass it by name.
    tokens = next(iter(list(inspect.signature(kind.forward).parameters)[1:]), "hidden_states")
    merged: Any = merging_class(kind)
    undo = redirect(block, kind, merged)
    block._vidtok = Slot(owner, index, tokens)
    block.__class__ = merged

    def back() -> None:
        undo()
        # fully_shard derives a class from the one that it meets; without its slot that goes on as ``kind`` does.
        if type(block) is merged:
            block.__class__ = kind
        del block._vidtok

    return back
