"""Which tile, warps and stages a GPU kernel uses: tables per SM, modelled or measured.

:func:`choose` answers a kernel's question; :func:`entry` says where the answer comes from. In order: the user
table that ``vidtok tune`` writes (``VIDTOK_TUNING``, else ``vidtok/tuning.json`` in the user's cache folder), the
table shipped for the SM, the cost model evaluated on the spot. Nothing here imports torch.

Knobs that change the bits of a result (``BITS`` of each operator) depend on dtype, the reduced extent and the table
only, never on batch size, rows or the running GPU's SM count; the others may follow the shape.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vidtok.kernels.tables._model import Candidate, Knobs
from vidtok.kernels.tables.gpus import GPUS, Gpu, nearest

__all__ = ["BACKENDS", "GPUS", "OPERATORS", "Candidate", "Entry", "Gpu", "best", "choose", "entry", "forced", "module"]

logger = logging.getLogger("vidtok")

BACKENDS = ("cuda", "triton")
OPERATORS = (
    "adjacent_similarity",
    "attention_topk",
    "bipartite",
    "cluster_dpc_knn",
    "contour_select",
    "plan_apply",
    "pool_packed",
    "position_remap",
    "topk_select",
)
FORMAT = 1


class Entry(NamedTuple):
    """What a table says: knobs, what limits them, and ``modelled`` or ``measured on <GPU>``."""

    knobs: Knobs
    limit: str
    source: str
    seconds: float


def module(op: str) -> ModuleType:
    """The file of one operator."""
    if op not in OPERATORS:
        raise ValueError(f"expected an operator among {', '.join(OPERATORS)}, got {op}")
    return importlib.import_module(f"vidtok.kernels.tables.{op}")


def best(backend: str, op: str, gpu: Gpu, dtype: str, shape: Mapping[str, int]) -> Entry:
    """The model's choice on a shape: the knobs that change bits from the frozen shape, the others with these fixed.

    Raises:
        ValueError: no candidate fits.
    """
    own = module(op)
    bits = own.BITS[backend]
    fixed: Knobs = {}
    if bits:
        knobs = _fastest(own, backend, op, gpu, dtype, own.frozen(shape), {}).knobs
        fixed = {name: knobs[name] for name in bits}
    return _fastest(own, backend, op, gpu, dtype, own.bucket(shape), fixed)


def _fastest(
    own: ModuleType, backend: str, op: str, gpu: Gpu, dtype: str, shape: Mapping[str, int], fixed: Knobs
) -> Entry:
    found: Entry | None = None
    why = "none has these knobs"
    for candidate in own.candidates(backend, gpu, dtype, shape):
        if any(candidate.knobs[name] != value for name, value in fixed.items()):
            continue
        if candidate.rejected is not None:
            why = candidate.rejected
            continue
        seconds = own.seconds(backend, gpu, dtype, shape, candidate.knobs)
        # A later candidate must gain 1 %: the first named is the plain one.
        if found is None or seconds < 0.99 * found.seconds:
            found = Entry(candidate.knobs, candidate.limit, "modelled", seconds)
    if found is None:
        raise ValueError(f"{op}: no candidate of the {backend} backend fits sm_{gpu.sm}: {why}")
    return found


_chosen: dict[tuple[Any, ...], Knobs] = {}
_forced: dict[tuple[str, str], Knobs] = {}


def choose(backend: str, op: str, sm: int, dtype: str, shape: Mapping[str, int]) -> Knobs:
    """Knobs of one kernel on one shape; do not change the dictionary.

    Args:
        backend: ``cuda`` or ``triton``.
        op: name of a file here.
        sm: for example 80; an SM without a table uses the nearest that asks for no more than it has.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shape: the operator's extents in the order of its ``SHAPE``.

    Raises:
        ValueError: an unknown name, a shape with other extents, or nothing that fits.
    """
    key = (backend, op, sm, dtype, *shape.values())
    knobs = _chosen.get(key)
    if knobs is None:
        if len(_chosen) >= 8192:
            _chosen.clear()
        knobs = _chosen[key] = entry(backend, op, sm, dtype, shape).knobs
    return knobs


def entry(backend: str, op: str, sm: int, dtype: str, shape: Mapping[str, int]) -> Entry:
    """What :func:`choose` answers, with its limit and source."""
    own = module(op)
    if tuple(shape) != own.SHAPE:
        raise ValueError(f"{op}: expected the extents {', '.join(own.SHAPE)}, got {', '.join(shape)}")
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {backend}")
    forced = _forced.get((backend, op))
    if forced is not None:
        return Entry(forced, "", "forced", 0.0)
    gpu = GPUS[nearest(sm)]
    return best(backend, op, gpu, dtype, shape)


@contextlib.contextmanager
def forced(backend: str, op: str, knobs: Knobs) -> Iterator[None]:
    """Make :func:`choose` answer ``knobs`` inside the block, whatever the shape."""
    before = _forced.get((backend, op))
    _forced[(backend, op)] = dict(knobs)
    _chosen.clear()
    try:
        yield
    finally:
        _forced.pop((backend, op))
        if before is not None:
            _forced[(backend, op)] = before
        _chosen.clear()
