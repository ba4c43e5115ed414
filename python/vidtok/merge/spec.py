"""Spec strings of ``vision=``: ``name[:key=value,…]``, as :mod:`vidtok.spec` reads them."""

from __future__ import annotations

from typing import Any

from vidtok.merge.options import ToMe
from vidtok.merge.tempme import TempMe
from vidtok.spec import SpecError, _fail, _nearest, _read

METHODS: dict[str, tuple[type, dict[str, str]]] = {
    "tome": (
        ToMe,
        {
            "r": "schedule",
            "ratio": "float",
            "k": "int",
            "metric": "word",
            "prop_attn": "bool",
            "protected": "int",
            "trace": "bool",
            "form": "word",
        },
    ),
    "tempme": (
        TempMe,
        {
            "frames": "int",
            "r": "schedule",
            "merge_layers": "schedule",
            "merge_frames": "schedule",
            "cross": "float",
            "intra": "float",
            "frame_pos": "bool",
            "output": "word",
            "metric": "word",
            "prop_attn": "bool",
            "protected": "int",
            "trace": "bool",
            "form": "word",
        },
    ),
}


def parse(text: str) -> Any:
    """The options that a spec such as ``"tome:r=8"`` means.

    Raises:
        SpecError: naming the offending part.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if name not in METHODS:
        _fail(text, text, f"a method: {_nearest(name, METHODS)}")
    kind, kinds = METHODS[name]
    options = _read(rest, kinds, name, text, text) if colon else {}
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"bad spec {text!r}: {name}: {error}") from None


def resolve(merge: Any) -> Any:
    """Options as they are, or those that a spec string means."""
    if isinstance(merge, str):
        return parse(merge)
    if isinstance(merge, tuple(kind for kind, _ in METHODS.values())):
        return merge
    raise TypeError(f"expected a spec string such as 'tome:r=8', or vidtok.merge.ToMe or TempMe options, got {merge!r}")
