"""Which backend serves an operator, and why.

``VIDTOK_BACKEND`` (``auto``, ``reference``, ``cpu``, ``cuda``, ``triton``) is read once at import;
:func:`use_backend` changes it for a block of code. The choice is made inside the registered
operator, so ``torch.compile`` never sees it.

On tensors of a GPU ``auto`` takes cuda, then triton, then the reference. On CPU tensors the GPU
backends run only in their stand-ins, which tests use: cuda in a module compiled for the host
(``VIDTOK_CUDA_MODULE``), triton in its interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vidtok import _check

logger = logging.getLogger("vidtok")

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
GPU_BACKENDS = ("cuda", "triton")
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


Kernel = Callable[..., Any]


class _State:
    requested: str = "auto"
    native: bool = False
    # The GPU backend whose stand-in serves CPU tensors, or None.
    stand_in: str | None = None
    # Kernels by (registered operator, device index), best first; emptied when the request changes.
    gpu: dict[tuple[str, int], tuple[Kernel, ...]] = {}


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


def can_run_cuda(operator: str, device: int | None = None, *, raise_error: bool = False) -> bool:
    """Whether the compiled CUDA backend can serve ``operator`` on a GPU (None: on CPU tensors, in a host module)."""
    return _settle(_cuda_obstacle(operator, device), raise_error)


def can_run_triton(operator: str, device: int | None = None, *, raise_error: bool = False) -> bool:
    """Whether Triton can serve ``operator`` on a GPU (None: on CPU tensors, in its interpreter)."""
    return _settle(_triton_obstacle(operator, device), raise_error)


def _settle(reason: str | None, raise_error: bool) -> bool:
    if reason is not None and raise_error:
        raise RuntimeError(reason)
    if reason is not None:
        logger.debug(reason)
    return reason is None


def _cuda_obstacle(operator: str | None, device: int | None) -> str | None:
    from vidtok.kernels import cuda

    why = cuda.obstacle(device)
    if why is None and operator is not None and not hasattr(cuda.extension(), operator):
        why = "this build does not hold it"
    return why and f"Can't run {operator or 'anything'} on the cuda backend; {why}."


def _triton_obstacle(operator: str | None, device: int | None) -> str | None:
    why = None
    if importlib.util.find_spec("triton") is None:
        why = "triton is not installed"
    elif device is None:
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            why = "CPU tensors need its interpreter (TRITON_INTERPRET=1)"
    else:
        sm = sm_of(device)
        if sm < 80:
            why = f"GPU {device} is sm_{sm} and Triton kernels need sm_80"
    return why and f"Can't run {operator or 'anything'} on the triton backend; {why}."


def sm_of(device: int) -> int:
    """Compute capability of a GPU as one number, 90 for 9.0; ``VIDTOK_CUDA_SM`` overrides it."""
    forced = os.environ.get("VIDTOK_CUDA_SM")
    if forced:
        return int(forced)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _gpu_obstacle(backend: str, operator: str | None, device: int | None) -> str | None:
    return _cuda_obstacle(operator, device) if backend == "cuda" else _triton_obstacle(operator, device)


def gpu_kernels(name: str, file: str, function: str, device: int | None) -> tuple[Kernel, ...]:
    """The kernels of GPU backends that can serve a registered operator there, best first.

    Args:
        name: of the registered operator, for example ``plan_apply_grad``.
        file: module under ``kernels/cuda`` and ``kernels/triton``.
        function: its function.
        device: index of the GPU, or None for CPU tensors served by a stand-in.
    """
    key = (name, -1 if device is None else device)
    known = state.gpu.get(key)
    if known is not None:
        return known
    wanted = GPU_BACKENDS if state.requested == "auto" else (state.requested,)
    operator = name if name in OPERATORS else name.removesuffix("_grad").removesuffix("_backward")
    found = []
    for backend in wanted:
        if backend not in GPU_BACKENDS:
            continue
        reason = _gpu_obstacle(backend, operator, device)
        if reason is not None:
            if state.requested != "auto":
                raise RuntimeError(reason)
            logger.info(reason)
            continue
        kernel = getattr(importlib.import_module(f"vidtok.kernels.{backend}.{file}"), function, None)
        if kernel is not None:
            found.append(kernel)
    state.gpu[key] = tuple(found)
    return state.gpu[key]


def _apply(requested: str, check: bool = True) -> None:
    if requested not in BACKENDS:
        _check.fail(f"a backend among {', '.join(BACKENDS)}", requested)
    stand_in = None
    if requested == "cpu":
        for operator in OPERATORS:
            can_run_cpu(operator, raise_error=True)
    elif requested in GPU_BACKENDS and not torch.cuda.is_available():
        reason = _gpu_obstacle(requested, None, None) if check else None
        if reason is not None:
            raise RuntimeError(reason)
        stand_in = requested
    state.requested = requested
    state.stand_in = stand_in
    # With a GPU asked for and present, CPU tensors go on as in automatic mode.
    state.native = requested != "reference" and stand_in is None and _C is not None
    state.gpu = {}


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


def report(device: int | None = None) -> list[Choice]:
    """For each operator the backend that serves tensors of a GPU (None: CPU tensors) now, and why."""
    rows = []
    for operator in OPERATORS:
        if state.requested == "reference":
            rows.append(Choice(operator, "reference", "asked for by VIDTOK_BACKEND or use_backend"))
            continue
        found = obstacles(operator, device)
        wanted = [b for b in found if state.requested in ("auto", b) or device is None]
        best = next((b for b in wanted if found[b] is None), "reference")
        if best == "cpu":
            reason = f"compiled, instruction set {build_info().get('isa')}"
        elif best == "reference":
            reason = " ".join(str(found[b]) for b in wanted) or f"{state.requested} is asked for, which serves no GPU"
        else:
            reason = "its stand-in, as VIDTOK_BACKEND asks" if device is None else f"serves cuda:{device}"
        rows.append(Choice(operator, best, reason))
    return rows


def obstacles(operator: str, device: int | None = None) -> dict[str, str | None]:
    """Per backend that could serve tensors of a GPU (None: CPU tensors), best first, why it cannot, or None."""
    if device is not None:
        return {backend: _gpu_obstacle(backend, operator, device) for backend in GPU_BACKENDS}
    if state.stand_in is not None:
        return {state.stand_in: _gpu_obstacle(state.stand_in, operator, None)}
    return {"cpu": _cpu_obstacle(operator)}


# The GPU backends import this module: whether one can run here is asked at the first call.
_apply(os.environ.get("VIDTOK_BACKEND", "auto"), check=False)
if _C is None and state.requested != "reference":
    warnings.warn(
        f"vidtok's compiled extension is missing ({_import_error}); the reference operators serve instead, slower. "
        "Reinstall with a C++17 compiler at hand, or set VIDTOK_BACKEND=reference to silence this.",
        RuntimeWarning,
        stacklevel=2,
    )
