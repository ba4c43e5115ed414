"""Versions of transformers that hooks are tested with, and how another one is recognised.

Hooks rely on what the forwards of a model, its masks and its caches do with their arguments. Those functions are
known by fingerprints of their syntax trees, recorded per supported version in ``fingerprints.json``. A model is taken
when everything that it relies on is as in one of the records, whatever the number of the installed version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from functools import cache as memo
from pathlib import Path
from typing import Any

from torch import nn

from vidtok.models.families import Places

#: Versions that the whole of ``tests/models`` runs on.
SUPPORTED = ("4.57.6", "5.17.0", "5.23.0")

#: What every model relies on: module of transformers -> functions, or classes of which all methods count.
SHARED = {
    "masking_utils": (
        "create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate", "eager_mask",
        "find_packed_sequence_indices", "flash_attention_mask", "prepare_padding_mask", "sdpa_mask",
        "_preprocess_mask_arguments",
    ),
    "modeling_flash_attention_utils": (
        "_flash_attention_forward", "_is_packed_sequence", "_upad_input", "prepare_fa_kwargs_from_position_ids",
    ),
    "cache_utils": (
        "Cache", "CacheLayerMixin", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer", "StaticCache",
        "StaticLayer", "StaticSlidingWindowLayer",
    ),
}  # fmt: skip

_OVERRIDE = "VIDTOK_UNTESTED_TRANSFORMERS"
_RECORD = Path(__file__).with_name("fingerprints.json")


class _Plain(ast.NodeTransformer):
    """What a function computes: docstrings, annotations and documentation decorators are left out."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        node.decorator_list = [d for d in node.decorator_list if "docstring" not in ast.dump(d)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """Without return annotation."""
        node.returns = None
        return self._body(node)

    def visit_arg(self, node: ast.arg) -> Any:
        """Without annotation."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        """As a plain assignment."""
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value is not None else None


def _dump(node: Any) -> str:
    # ast.dump writes other fields in other versions of Python.
    if isinstance(node, list):
        return "[" + ",".join(map(_dump, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((n, v) for n, v in ast.iter_fields(node) if v not in (None, []) and n not in ("kind", "type_params"))
    return f"{type(node).__name__}({','.join(f'{n}={_dump(v)}' for n, v in fields)})"


def fingerprint(function: Any) -> str | None:
    """Twelve hex digits of a function's normalised syntax tree, or of all methods of a class; None without source.

    Comments, docstrings, annotations and layout do not count; decorators do.
    """
    if isinstance(function, type):
        methods = {n: getattr(m, "__func__", m) for n, m in vars(function).items()}
        methods = {n: m.fget if isinstance(m, property) else m for n, m in methods.items()}
        parts = [f"{n}={fingerprint(m)}" for n, m in sorted(methods.items()) if inspect.isfunction(m)]
        return _digest(";".join(parts))
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return None
    return _digest(_dump(_Plain().visit(ast.parse(textwrap.dedent(source)))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@memo
def records() -> dict[str, dict[str, str]]:
    """Version -> name of a function or class -> fingerprint."""
    table: dict[str, dict[str, str]] = {version: {} for version in SUPPORTED}
    for name, row in json.loads(_RECORD.read_text(encoding="utf-8")).items():
        for version, value in zip(SUPPORTED, row):
            if value is not None:
                table[version][name] = value
    return table


def installed() -> str:
    """Version of the transformers at hand."""
    return str(sys.modules["transformers"].__version__)


def short(module: str, name: str) -> str:
    """``transformers.models.x.modeling_x``, ``Y.forward`` -> ``x.Y.forward``."""
    path = [part for part in module.split(".") if part not in ("transformers", "models")]
    if len(path) == 2 and path[1].startswith("modeling_"):
        path = path[:1] if path[1] == f"modeling_{path[0]}" else [path[0], path[1].removeprefix("modeling_")]
    return ".".join([*path, name])


def modules(places: Places) -> Iterator[nn.Module]:
    """Modules whose forwards the hooks rely on; of equal layers each, since one may have been replaced."""
    outer = [] if places.outer is None or places.outer is places.base else [places.outer]
    language: Any = places.language_model
    yield from [*outer, places.base, *([] if language is places.base else [language])]
    for child in language.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                yield layer
                yield from (part for part in layer.children() if hasattr(part, "layer_idx"))
        elif type(child).__name__.endswith("RotaryEmbedding"):
            yield child


_seen: dict[Any, tuple[Any, str | None]] = {}


def _known(name: str, function: Any) -> str | None:
    """The fingerprint of what now stands at ``name``, computed once."""
    before = _seen.get(name)
    if before is None or before[0] is not function:
        before = _seen[name] = (function, fingerprint(function))
    return before[1]


@memo
def _homes() -> tuple[str, ...]:
    """Folders of transformers and torch, whose decorators it uses."""
    return tuple(str(Path(str(sys.modules[name].__file__)).parent) + os.sep for name in ("transformers", "torch"))


def _foreign(function: Any) -> bool:
    """Whether a function, or something that it is wrapped in, was not defined by transformers."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_homes()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def forwards(parts: Iterable[nn.Module]) -> tuple[dict[str, str | None], list[str]]:
    """Names of the forwards of these modules with fingerprints, and which were replaced."""
    found: dict[str, str | None] = {}
    replaced: dict[str, None] = {}
    for module in parts:
        # While tokens merge, a block is of a class on top of its own.
        cls: Any = type(module)
        while hasattr(cls, "_vidtok_kind"):
            cls = cls._vidtok_kind
        # accelerate keeps the forward that its own calls.
        own = vars(module).get("forward")
        # transformers 4.57 leaves the class's own behind where it has captured attention weights.
        if getattr(own, "__func__", None) is cls.forward and getattr(own, "__self__", None) is module:
            own = None
        if own is not None and not {"_old_forward", "_original_forward"} & set(vars(module)):
            replaced[f"the forward of one {cls.__name__}"] = None
        owner = next(c for c in cls.__mro__ if "forward" in vars(c))
        function = vars(owner)["forward"]
        name = short(owner.__module__, f"{owner.__qualname__}.forward")
        if name in found:
            continue
        if _foreign(function):
            replaced[f"{cls.__name__}.forward"] = None
        else:
            found[name] = _known(name, function)
    return found, list(replaced)


def relied(places: Places) -> tuple[dict[str, str | None], list[str]]:
    """Names of what the hooks of these modules rely on with fingerprints, and what was replaced."""
    found, replaced = forwards(modules(places))
    for where, names in SHARED.items():
        place = importlib.import_module(f"transformers.{where}")
        for name in names:
            thing = getattr(place, name, None)
            if thing is None:
                continue
            if not isinstance(thing, type) and _foreign(thing):
                replaced.append(f"{where}.{name}")
            else:
                found[f"{where}.{name}"] = _known(f"{where}.{name}", thing)
    return found, replaced


def _difference(found: dict[str, str | None], record: dict[str, str], same: bool, shared: set[str]) -> list[str]:
    """Names that are not as in the record; on the recorded version itself, what it does not know is as it was."""
    gone = [f"{name} is gone" for name in sorted(shared) if name in record and name not in found]
    changed = []
    for name, value in found.items():
        if value is None or (same and name not in record):
            continue
        if record.get(name) != value:
            changed.append(f"{name} {'changed' if name in record else 'is new'}")
    return changed + gone


def check(places: Places) -> None:
    """Raise unless everything that hooks in ``places`` rely on is as in a supported version of transformers.

    ``VIDTOK_UNTESTED_TRANSFORMERS=1`` in the environment makes it a warning.

    Args:
        places: what :func:`vidtok.models.families.locate` found.

    Raises:
        ValueError: naming the supported versions and what differs.
    """
    shared = {f"{where}.{name}" for where, names in SHARED.items() for name in names}
    _judge(*relied(places), shared)


def check_tower(parts: Iterable[nn.Module]) -> None:
    """Raise unless the forwards of a vision tower's modules are as in a supported version; see :func:`check`."""
    ours = (m for m in parts if any(c.__module__.startswith("transformers.") for c in type(m).__mro__))
    _judge(*forwards(ours), set())


def _judge(found: dict[str, str | None], replaced: list[str], shared: set[str]) -> None:
    version = installed()
    if replaced:
        _refuse(f"got {_few(replaced)} replaced from outside of it")
        return
    table = records()
    tried = (version,) if version in table else tuple(reversed(SUPPORTED))
    differences = [_difference(found, table[known], known == version, shared) for known in tried]
    best = min(differences, key=len)
    if best:
        closest = tried[differences.index(best)]
        where = "" if closest == version else f", compared with {closest}"
        _refuse(f"got {version}, in which {_few(best)}{where}")


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _refuse(got: str) -> None:
    message = f"expected transformers {', '.join(SUPPORTED)} or one with the same forwards, masks and caches, {got}"
    if os.environ.get(_OVERRIDE) == "1":
        warnings.warn(f"{message}; going on, because {_OVERRIDE}=1", UserWarning, stacklevel=5)
        return
    raise ValueError(f"{message} ({_OVERRIDE}=1 goes on at your own risk)")
