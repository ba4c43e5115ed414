"""Which tile, warps and stages a GPU kernel uses: tables per SM, modelled or measured.

:func:`choose` answers a kernel's question; :func:`entry` says where the answer comes from. In order: the user
table that ``vidtok tune`` writes (``VIDTOK_TUNING``, else ``vidtok/tuning.json`` in the user's cache folder), the
table shipped for the SM, the cost model evaluated on the spot. Nothing here imports torch.

Knobs that change the bits of a result (``BITS`` of each operator) depend on dtype, the reduced extent and the table
only, never on batch size, rows or the running GPU's SM count; the others may follow the shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from vidtok.kernels.tables import _files
from vidtok.kernels.tables._files import Entry, Table, key
from vidtok.kernels.tables._model import Candidate, Knobs
from vidtok.kernels.tables._operators import BACKENDS, DTYPES, OPERATORS, backends, dtypes, module, named_dtype, shapes
from vidtok.kernels.tables.gpus import GPUS, Gpu, nearest

__all__ = [
    "BACKENDS", "DTYPES", "GPUS", "OPERATORS", "Candidate", "Entry", "Gpu", "backends", "choose", "dtypes", "entry",
    "fastest", "forced", "module", "nearest", "reload", "resolve", "shapes",
]  # fmt: skip


def resolve(
    backend: str, op: str, gpu: Gpu, dtype: str, shape: Mapping[str, int], layers: tuple[Table, ...] = ()
) -> Entry:
    """The choice on a shape, from the first of ``layers`` that has it, else from the model. A pure function.

    Knobs that change bits are settled first, on the operator's frozen shape; then the others, with these fixed.

    Raises:
        ValueError: no candidate fits.
    """
    own = module(op)
    fixed, source = frozen(backend, op, gpu, dtype, shape, layers)
    bucket = own.bucket(shape)
    at = key(backend, op, dtype, bucket)
    for layer in layers:
        found = layer.entries.get(at)
        if found is not None and all(found.knobs[name] == value for name, value in fixed.items()):
            return found
    found = fastest(own, backend, op, gpu, dtype, bucket, fixed)
    if source != "modelled":
        found = found._replace(source=f"modelled, {' and '.join(sorted(fixed))} {source}")
    return found


def frozen(
    backend: str, op: str, gpu: Gpu, dtype: str, shape: Mapping[str, int], layers: tuple[Table, ...] = ()
) -> tuple[Knobs, str]:
    """The knobs that change bits, and where they come from."""
    own = module(op)
    if not own.BITS[backend]:
        return {}, "modelled"
    canonical = own.frozen(shape)
    at = key(backend, op, dtype, canonical)
    for layer in layers:
        found = layer.frozen.get(at)
        if found is not None:
            return found.knobs, found.source
    knobs = fastest(own, backend, op, gpu, dtype, canonical, {}).knobs
    return {name: value for name, value in knobs.items() if name in own.BITS[backend]}, "modelled"


def fastest(
    own: ModuleType, backend: str, op: str, gpu: Gpu, dtype: str, shape: Mapping[str, int], fixed: Knobs
) -> Entry:
    """The model's choice among the candidates that hold the ``fixed`` knobs."""
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


class Forced:
    """Knobs that :func:`forced` imposes, and whether a kernel has asked for them."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs, self.asked = dict(knobs), False


_chosen: dict[tuple[Any, ...], Knobs] = {}
_forced: dict[tuple[str, str], Forced] = {}


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
    at = (backend, op, sm, dtype, *shape.values())
    knobs = _chosen.get(at)
    if knobs is None:
        if len(_chosen) >= 8192:
            _chosen.clear()
        # The model takes up to a millisecond, and shapes that share a line of the table share its answer.
        line = _line(backend, op, sm, dtype, shape)
        knobs = _chosen.get(line)
        if knobs is None:
            knobs = _chosen[line] = entry(backend, op, sm, dtype, shape).knobs
        _chosen[at] = knobs
    return knobs


def _line(backend: str, op: str, sm: int, dtype: str, shape: Mapping[str, int]) -> tuple[Any, ...]:
    """What the answer depends on."""
    own = module(op)
    if tuple(shape) != own.SHAPE:
        return ()  # refused by :func:`entry`
    return backend, op, sm, dtype, tuple(own.bucket(shape).items()), tuple(own.frozen(shape).items())


def entry(backend: str, op: str, sm: int, dtype: str, shape: Mapping[str, int]) -> Entry:
    """What :func:`choose` answers, with its limit and source."""
    own = module(op)
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {backend}")
    if tuple(shape) != own.SHAPE:
        raise ValueError(f"{op}: expected the extents {', '.join(own.SHAPE)}, got {', '.join(shape)}")
    imposed = _forced.get((backend, op))
    if imposed is not None:
        imposed.asked = True
        return Entry(imposed.knobs, "", "forced", 0.0)
    near, dtype = nearest(sm), named_dtype(op, dtype)
    if dtype not in dtypes(op, near):
        listed = " or ".join(dtypes(op, near))
        raise ValueError(f"{op}: expected {listed}, got {dtype} (sm_{sm} has no {dtype} arithmetic)")
    layers = (_files.user(sm), _files.shipped(near))
    return resolve(backend, op, GPUS[near], dtype, shape, layers)


@contextlib.contextmanager
def forced(backend: str, op: str, knobs: Knobs) -> Iterator[Forced]:
    """Make :func:`choose` answer ``knobs`` inside the block, whatever the shape."""
    before = _forced.get((backend, op))
    _forced[(backend, op)] = Forced(knobs)
    _chosen.clear()
    try:
        yield _forced[(backend, op)]
    finally:
        del _forced[(backend, op)]
        if before is not None:
            _forced[(backend, op)] = before
        _chosen.clear()


def reload() -> None:
    """Read the files anew at the next question: a table was written, or ``VIDTOK_TUNING`` changed."""
    _files.user.cache_clear()
    _files.shipped.cache_clear()
    _chosen.clear()
