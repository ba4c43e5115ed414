"""Methods: pure functions ``(features [N, C], grid_thw [V, 3], **options) -> Plan``.

Every video is decided by itself, so that a video in a batch gets the plan that it gets alone.
"""

from __future__ import annotations

from vidtok.methods._common import GridLike, Method, grids
from vidtok.methods.dtd import METHOD as _dtd
from vidtok.methods.dtd import dtd
from vidtok.methods.evs import METHOD as _evs
from vidtok.methods.evs import evs
from vidtok.methods.pool import METHOD as _pool
from vidtok.methods.pool import pool
from vidtok.methods.prunevid import METHOD as _prunevid
from vidtok.methods.prunevid import prunevid
from vidtok.methods.random import METHOD as _random
from vidtok.methods.random import random
from vidtok.methods.tome import METHOD as _tome
from vidtok.methods.tome import tome
from vidtok.methods.uniform import METHOD as _uniform
from vidtok.methods.uniform import uniform

METHODS: dict[str, Method] = {m.name: m for m in (_dtd, _evs, _pool, _prunevid, _random, _tome, _uniform)}

__all__ = ["METHODS", "Method", "count", "dtd", "evs", "pool", "prunevid", "random", "tome", "uniform"]


def count(name: str, grid_thw: GridLike, **options: object) -> list[int] | None:
    """Tokens that a method leaves of each video, from shapes alone; None when features decide.

    Args:
        name: a key of :data:`METHODS`.
        grid_thw: ``[V, 3]`` token grids.
        options: the options of the method.

    Raises:
        ValueError: for an unknown method or options outside their range.

    Example:
        >>> count("uniform", [(4, 14, 14), (1, 2, 5)], ratio=0.5)
        [392, 5]
    """
    if name not in METHODS:
        raise ValueError(f"expected a method among {', '.join(sorted(METHODS))}, got {name!r}")
    method = METHODS[name]
    method.check(**options)
    counts = [method.count(grid, **options) for grid in grids(grid_thw)]
    return None if any(c is None for c in counts) else [c for c in counts if c is not None]
