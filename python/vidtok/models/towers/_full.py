"""Every token again where something beside the next block reads what a block gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vidtok.merge.attach import Merging


def _inert(*args: Any) -> None:
    """What a hook becomes in a copied or pickled model."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """A hook that stays with its module: copies and pickles of the module get an inert one."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


def _full(merging: Merging, index: int, x: Tensor) -> Tensor:
    """What enters block ``index``, with every token of the tower."""
    return x if merging.run is None else merging.run.full(index, x)


def read_after(modules: Sequence[nn.Module], layers: Sequence[int], merging: Merging) -> Callable[[], None]:
    """Give every token to ``modules``, which read what the blocks ``layers`` give."""
    handles = []
    for module, layer in zip(modules, layers, strict=True):

        def before(module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> Any:
            return (_full(merging, layer + 1, args[0]), *args[1:])

        handles.append(module.register_forward_pre_hook(_Hook(before)))

    def back() -> None:
        for handle in handles:
            handle.remove()

    return back


def recorded(tower: nn.Module, merging: Merging) -> Callable[[], None]:
    """Give every token in the hidden states that the tower's output records."""

    def spread(states: Any) -> Any:
        return tuple(x if x is None else _full(merging, i, x) for i, x in enumerate(states))

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        states = getattr(out, "hidden_states", None)
        if isinstance(states, tuple) and len(states) == merging.layers + 1:
            out.hidden_states = spread(states)
        elif type(out) is tuple:
            return tuple(spread(x) if isinstance(x, tuple) and len(x) == merging.layers + 1 else x for x in out)
        return out

    handle = tower.register_forward_hook(_Hook(after))
    return handle.remove
