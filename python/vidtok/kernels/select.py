"""Which backend serves an operator, and why.

``VIDTOK_BACKEND`` (``auto``, ``reference``, ``cpu``) is read once at import; :func:`use_backend`
changes it for a block of code. The choice is made inside the registered operator, so
``torch.compile`` never sees it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from vidtok import _check

logger = logging.getLogger("vidtok")

BACKENDS = ("auto", "reference", "cpu")
OPERATORS = (
    "adjacent_similarity",
    "attention_topk",
    "bipartite_match",
    "bipartite_merge",
    "cluster_dpc_knn",
    "contour_select",
    "plan_apply",
    "pool_packed",
    "position_remap",
    "topk_select",
)

_C: ModuleType | None
_import_error: str | None = None
try:
    from vidtok import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = None
    _import_error = str(error)


class Choice(NamedTuple):
    """What :func:`report` says of one operator."""

    operator: str
    backend: str
    reason: str


class _State:
    requested: str = "auto"
    native: bool = False


state = _State()


def holds(operator: str) -> bool:
    """Whether the extension was built with this operator."""
    return _C is not None and hasattr(_C, operator)


def can_run_cpu(operator: str, *, raise_error: bool = False) -> bool:
    """Whether the compiled CPU backend can serve ``operator``; the reason is logged or raised."""
    reason = _cpu_obstacle(operator)
    if reason is None:
        return True
    if raise_error:
        raise RuntimeError(reason)
    logger.debug(reason)
    return False


def _cpu_obstacle(operator: str) -> str | None:
    if _C is None:
        return f"Can't run {operator} on the cpu backend; the compiled extension is missing ({_import_error})."
    if not holds(operator):
        return f"Can't run {operator} on the cpu backend; this build of the extension does not hold it."
    return None


def _apply(requested: str) -> None:
    if requested not in BACKENDS:
        _check.fail(f"a backend among {', '.join(BACKENDS)}", requested)
    if requested == "cpu":
        for operator in OPERATORS:
            can_run_cpu(operator, raise_error=True)
    state.requested = requested
    state.native = requested != "reference" and _C is not None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every operator inside the block; raises when it cannot run here."""
    before = state.requested
    _apply(name)
    try:
        yield
    finally:
        _apply(before)


def extension() -> Any:
    """The compiled module; raises when it is missing."""
    if _C is None:
        raise RuntimeError(f"the compiled extension is missing ({_import_error})")
    return _C


def build_info() -> dict[str, Any]:
    """What the compiled extension holds: instruction sets built, supported and in use."""
    if _C is None:
        return {"extension": None, "error": _import_error}
    return {"extension": getattr(_C, "__file__", None), **_C.build_info()}


def report() -> list[Choice]:
    """For each operator the backend that serves CPU tensors now, and why."""
    rows = []
    for operator in OPERATORS:
        obstacle = _cpu_obstacle(operator)
        if state.requested == "reference":
            rows.append(Choice(operator, "reference", "asked for by VIDTOK_BACKEND or use_backend"))
        elif obstacle:
            rows.append(Choice(operator, "reference", obstacle))
        else:
            rows.append(Choice(operator, "cpu", f"compiled, instruction set {build_info().get('isa')}"))
    return rows


_apply(os.environ.get("VIDTOK_BACKEND", "auto"))
if _C is None and state.requested != "reference":
    warnings.warn(
        f"vidtok's compiled extension is missing ({_import_error}); the reference operators serve instead, slower. "
        "Reinstall with a C++17 compiler at hand, or set VIDTOK_BACKEND=reference to silence this.",
        RuntimeWarning,
        stacklevel=2,
    )
