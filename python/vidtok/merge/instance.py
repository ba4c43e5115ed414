"""Modules that carry a forward of their own, beside their class's.

accelerate puts one on a module to move weights, and keeps the class's as ``_old_forward``; transformers 4.57 leaves
the class's behind where it has recorded hidden states or attention weights.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

_KEPT = ("forward", "_old_forward")


def redirect(module: Any, before: Any, after: Any) -> Callable[[], None]:
    """Let a module whose class changes from ``before`` to ``after`` call the new forward; the result takes that back.

    Raises:
        ValueError: for a forward from elsewhere, which would be called instead.
    """
    own = vars(module).get("forward")
    if own is not None and not _calls(own, before.forward) and "_old_forward" not in vars(module):
        raise ValueError(f"expected the {before.__name__} that merges to have its class's forward, got a replaced one")
    _change(module, before, after)
    return lambda: _change(module, after, before)


def _calls(own: Any, function: Any) -> bool:
    return getattr(own, "__func__", None) is function


def _change(module: Any, before: Any, after: Any) -> None:
    for name in _KEPT:
        if _calls(vars(module).get(name), before.forward):
            vars(module)[name] = MethodType(after.forward, module)


def plain(state: dict[str, Any], module: Any, before: Any, after: Any) -> dict[str, Any]:
    """The attributes ``state`` of a copy whose class is ``after`` where the module's is ``before``."""
    bound = {name: MethodType(after.forward, module) for name in _KEPT if _calls(state.get(name), before.forward)}
    return {**state, **bound}
