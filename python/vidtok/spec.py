"""Spec strings: ``name[:key=value,…]`` stages joined by ``+``.

Grammar (blanks between parts are ignored)::

    pipeline = stage { "+" stage }
    stage    = name [ ":" option { "," option } ]
    option   = key "=" value
    value    = number | word | "true" | "false" | "[" numbers "]" | "(" numbers ")"

The keys of a stage are the options of the function of that name in :mod:`vidtok.methods`; every
``ratio`` is the share kept. ``images=true`` on any stage lets the whole pipeline act on images too.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor

from vidtok import methods, ops
from vidtok.methods._common import Grid, GridLike, Method, grids, tokens
from vidtok.plan import Plan

__all__ = ["Pipeline", "SpecError", "Stage", "parse", "resolve"]

_INT = re.compile(r"-?[0-9]+", re.ASCII)
_FLOAT = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE]-?[0-9]+)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "word": "a word",
    "pair": "a pair of integers such as (12,12)",
    "schedule": "an integer, a list of integers such as [8,8,4], or a pair such as (8,-1)",
}
_LONGEST = 4096


class SpecError(ValueError):
    """A spec that does not parse or whose options are refused."""


def _fail(spec: str, part: str, expected: str) -> NoReturn:
    def shown(text: str) -> str:
        return repr(text if len(text) <= 120 else f"{text[:117]}...")

    where = f" in {shown(part)}" if part != spec else ""
    raise SpecError(f"bad spec {shown(spec)}: expected {expected}{where}")


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"one of {', '.join(names)}, got {word[:60]!r}{hint}"


def _split(text: str, separator: str, spec: str) -> list[str]:
    """Split at separators outside brackets, which must match and do not nest."""
    parts, start, opened = [], 0, ""
    for i, char in enumerate(text):
        if char in "[(":
            if opened:
                _fail(spec, text, "brackets that do not nest")
            opened = char
        elif char in "])":
            if {"[": "]", "(": ")"}.get(opened) != char:
                _fail(spec, text, f"brackets that match, got {char!r}")
            opened = ""
        elif char == separator and not opened:
            parts.append(text[start:i])
            start = i + 1
    if opened:
        _fail(spec, text, f"{opened!r} to be closed")
    return [*parts, text[start:]]


def _number(text: str, part: str, spec: str) -> int | float:
    word = text.strip()
    if len(word) <= 40:
        if _INT.fullmatch(word):
            return int(word)
        if _FLOAT.fullmatch(word) and math.isfinite(float(word)):
            return float(word)
    _fail(spec, part, f"a finite number, got {word[:60]!r}")


def _value(text: str, kind: str, part: str, spec: str) -> Any:
    word = text.strip()
    if kind == "bool":
        if word not in ("true", "false"):
            _fail(spec, part, "true or false")
        return word == "true"
    if kind == "word":
        return _typed(word, kind, part, spec)
    if word[:1] and word[0] in "[(":
        inner = word[1:-1].strip()
        items = [_number(x, part, spec) for x in inner.split(",")] if inner else []
        value: Any = items if word[0] == "[" else tuple(items)
    elif not word:
        _fail(spec, part, f"a value: {_KINDS[kind]}")
    else:
        value = _number(word, part, spec)
    return _typed(value, kind, part, spec)


def _typed(value: Any, kind: str, part: str, spec: str) -> Any:
    """``value`` in the type of ``kind``, or an error."""

    def is_int(v: object) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    def is_number(v: object) -> bool:
        return is_int(v) or (isinstance(v, float) and math.isfinite(v))

    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "word" and isinstance(value, str) and _NAME.fullmatch(value):
        return value
    if kind == "float" and is_number(value):
        return float(value)
    if kind in ("int", "schedule") and is_int(value):
        return value
    if kind in ("pair", "schedule") and isinstance(value, list | tuple):
        pair = len(value) == 2 and is_int(value[0])
        if kind == "pair" and pair and is_int(value[1]):
            return tuple(value)
        if kind == "schedule" and isinstance(value, tuple) and pair and is_number(value[1]):
            return value
        if kind == "schedule" and isinstance(value, list) and value and all(map(is_int, value)):
            return value
    _fail(spec, part, _KINDS[kind])


def _text(value: Any) -> str:
    if isinstance(value, bool | str):
        return value if isinstance(value, str) else str(value).lower()
    if isinstance(value, list | tuple):
        inner = ",".join(map(_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    # "+" joins stages, so an exponent goes without it.
    return repr(value).replace("e+", "e")


def _options(name: str, options: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """The options of a method, typed, in the canonical order; raises for those that it refuses."""
    if name not in methods.METHODS:
        _fail(spec, name, f"a method: {_nearest(name, methods.METHODS)}")
    method = methods.METHODS[name]
    for key in options:
        if key not in method.kinds:
            _fail(spec, name, f"a key of {name}: {_nearest(key, [*method.kinds, 'images'])}")
    typed: dict[str, Any] = {}
    for key, kind in method.kinds.items():
        if key not in options:
            if key not in method.defaults:
                _fail(spec, name, f"{key}=… ({_KINDS[kind]})")
        elif options[key] is None and method.defaults.get(key, 0) is None:
            typed[key] = None
        else:
            typed[key] = _typed(options[key], kind, f"{key}={options[key]!r}", spec)
    try:
        method.check(**typed)
    except (TypeError, ValueError) as error:
        raise SpecError(f"bad spec {spec!r}: {name}: {error}") from None
    return typed


@dataclass(frozen=True)
class Stage:
    """One method with its options; calling it gives a :class:`~vidtok.Plan`.

    Args:
        name: a key of :data:`vidtok.methods.METHODS`.
        options: the options that were given; the others keep their defaults.
        images: whether images are reduced too.

    Raises:
        SpecError: for an unknown name, an unknown or missing option, or a value outside its range.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    images: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _options(self.name, self.options, self.name))

    @property
    def method(self) -> Method:
        """The method behind the name."""
        return methods.METHODS[self.name]

    def __call__(self, features: Tensor, grid_thw: GridLike) -> Plan:
        return self.method.run(features, grid_thw, **self.options)

    def __str__(self) -> str:
        defaults = self.method.defaults
        parts = [
            f"{key}={_text(value)}"
            for key, value in self.options.items()
            if key not in defaults or value != defaults[key] or type(value) is not type(defaults[key])
        ]
        if self.images:
            parts.append("images=true")
        return self.name + (":" + ",".join(parts) if parts else "")


@dataclass(frozen=True)
class Pipeline:
    """Stages that run in order; calling it gives the composed :class:`~vidtok.Plan`.

    Args:
        stages: a :class:`Stage` or any callable ``(features, grid_thw) -> Plan`` each. A stage that
            needs a (t, h, w) grid may stand only where the tokens still lie on one: first, or after
            stages that give a grid again (``pool``).

    Raises:
        SpecError: for no stage, a stage that cannot stand where it does, or ``images`` set to both.
    """

    stages: Sequence[Stage | Callable[[Tensor, GridLike], Plan]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        spec = str(self)
        if not self.stages:
            _fail(spec, spec, "at least one stage")
        if len({s.images for s in self.stages if isinstance(s, Stage)} - {None}) > 1:
            _fail(spec, spec, "images to be true or false for the whole pipeline, not both")
        before = ""
        for stage in self.stages:
            if before and isinstance(stage, Stage) and stage.method.needs_grid:
                _fail(spec, spec, f"{stage.name} before {before}, which leaves no (t, h, w) grid")
            if not (isinstance(stage, Stage) and stage.method.out_grid):
                before = before or _name(stage)

    @property
    def images(self) -> bool:
        """Whether images are reduced too."""
        return any(bool(getattr(stage, "images", False)) for stage in self.stages)

    def count(self, grid_thw: GridLike) -> list[int] | None:
        """Tokens left of each video, from shapes alone; None when features decide."""
        shape: list[Grid] = grids(grid_thw)
        for stage in self.stages:
            if not isinstance(stage, Stage):
                return None
            counts = [stage.method.count(grid, **stage.options) for grid in shape]
            if any(c is None for c in counts):
                return None
            shape = _after(stage, shape, [c for c in counts if c is not None])
        return [tokens(grid) for grid in shape]

    def __call__(self, features: Tensor, grid_thw: GridLike) -> Plan:
        shape = grids(grid_thw)
        total: Plan | None = None
        x = features.detach()
        for i, stage in enumerate(self.stages):
            plan = stage(x, shape if i else grid_thw)
            _check_plan(plan, stage, x.shape[0], len(shape))
            total = plan if total is None else total.compose(plan)
            if i + 1 < len(self.stages):
                x = ops.plan_apply(plan, x)
                counts = _host_counts(stage, shape) or plan.lengths_out()
                shape = _after(stage, shape, counts)
        assert total is not None
        return total

    def __str__(self) -> str:
        first = next((i for i, s in enumerate(self.stages) if isinstance(s, Stage)), -1) if self.images else -1
        parts = [
            str(replace(s, images=i == first)) if isinstance(s, Stage) else _name(s) for i, s in enumerate(self.stages)
        ]
        return "+".join(parts)


def _name(stage: object) -> str:
    if isinstance(stage, Stage):
        return stage.name
    return getattr(stage, "__name__", None) or type(stage).__name__


def _host_counts(stage: object, shape: Sequence[Grid]) -> list[int] | None:
    if not isinstance(stage, Stage):
        return None
    counts = [stage.method.count(grid, **stage.options) for grid in shape]
    return None if any(c is None for c in counts) else [c for c in counts if c is not None]


def _after(stage: object, shape: Sequence[Grid], counts: Sequence[int]) -> list[Grid]:
    """Grids after a stage; tokens that lie on none count as frames of one token."""
    if isinstance(stage, Stage) and stage.method.out_grid:
        return [stage.method.out_grid(grid, **stage.options) for grid in shape]
    return [(n, 1, 1) for n in counts]


def _check_plan(plan: object, stage: object, num_in: int, videos: int) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"expected {_name(stage)} to return a vidtok.Plan, got {type(plan).__name__}")
    if plan.num_in != num_in or plan.num_sequences != videos:
        raise ValueError(
            f"expected {_name(stage)} to return a plan over {num_in} tokens of {videos} videos, "
            f"got one over {plan.num_in} tokens of {plan.num_sequences}"
        )


def _read(rest: str, kinds: Mapping[str, str], name: str, text: str, spec: str) -> dict[str, Any]:
    """The ``key=value,…`` of a stage ``text``, typed by ``kinds``."""
    options: dict[str, Any] = {}
    for item in _split(rest, ",", spec):
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not _NAME.fullmatch(key):
            _fail(spec, text, f"key=value after the colon, got {item.strip()[:60]!r}")
        if key not in kinds:
            _fail(spec, text, f"a key of {name}: {_nearest(key, kinds)}")
        if key in options:
            _fail(spec, text, f"{key} once")
        options[key] = _value(value, kinds[key], item.strip(), spec)
    return options


def _stage(text: str, spec: str) -> Stage:
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        _fail(spec, text, "a method name")
    if name not in methods.METHODS:
        _fail(spec, text, f"a method: {_nearest(name, methods.METHODS)}")
    kinds = {**methods.METHODS[name].kinds, "images": "bool"}
    options = _read(rest, kinds, name, text, spec) if colon else {}
    images = options.pop("images", None)
    return Stage(name, _options(name, options, spec), images)


def parse(spec: str) -> Pipeline:
    """Read a spec string.

    Args:
        spec: ``name[:key=value,…]`` stages joined by ``+``.

    Returns:
        A :class:`Pipeline`; ``str()`` of it is the canonical spec, in which options keep one order
        and those equal to their defaults are left out, and ``parse`` of that gives it back.

    Raises:
        SpecError: naming the offending part and, for unknown words, the nearest known one.
        TypeError: when ``spec`` is not a string.

    Example:
        >>> str(parse("prunevid:cluster_ratio=.5, tau=0.9 + uniform:k=64"))
        'prunevid:tau=0.9+uniform:k=64'
    """
    if not isinstance(spec, str):
        raise TypeError(f"expected a spec string, got {type(spec).__name__}")
    if len(spec) > _LONGEST:
        _fail(spec, spec, f"at most {_LONGEST} characters, got {len(spec)}")
    return Pipeline([_stage(part.strip(), spec) for part in _split(spec, "+", spec)])


def resolve(spec: str | Pipeline | Stage | Callable[[Tensor, GridLike], Plan]) -> Pipeline:
    """The pipeline that a spec string or an object means.

    Args:
        spec: a spec string, a :class:`Pipeline`, a :class:`Stage`, or any callable
            ``(features [N, C], grid_thw [V, 3]) -> Plan``, whose attribute ``images`` (False when
            absent) says whether it takes images too.

    Returns:
        A :class:`Pipeline`: callable as ``(features, grid_thw) -> Plan``, with ``images`` and ``str()``.

    Raises:
        SpecError: for a string that does not parse.
        TypeError: for anything that is neither a string nor callable.
    """
    if isinstance(spec, Pipeline):
        return spec
    if isinstance(spec, str):
        return parse(spec)
    if callable(spec) and not isinstance(spec, type):
        return Pipeline((spec,))
    raise TypeError(f"expected a spec string or a callable (features, grid_thw) -> Plan, got {spec!r}")
