"""A method of one module that runs another way for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def _empty(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def override(module: Any, **runs: Callable[..., Any]) -> Callable[[], None]:
    """Let ``run(module, own, *args, **kwargs)`` stand for the method of that name, with ``own`` the method itself.

    The module's class becomes a generated subclass; copies and pickles of the module are of the class underneath.
    The result takes it back.
    """
    kind: Any = type(module)
    plain = getattr(kind, "_vidtok_plain", kind)

    def method(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        own = getattr(kind, name)

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run(self, functools.partial(own, self), *args, **kwargs)

        return call

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (plain,), dict(vars(self))

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {name: method(name, run) for name, run in runs.items()}
    module.__class__ = type(
        kind.__name__, (kind,), {**methods, **names, "__reduce_ex__": reduce, "_vidtok_plain": plain}
    )

    def back() -> None:
        module.__class__ = kind

    return back
