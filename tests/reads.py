"""Tensors that stand for those of a GPU: reading one on the host is an error, since it would wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result, or its size, must be known on the host.
READS = (
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "repeat_interleave.Tensor",
)  # fmt: skip


class Read(Exception):
    """Something on the device was read."""


def mark(t: Tensor) -> Tensor:
    """Let ``t`` count as a tensor on the device."""
    t._on_device = True  # type: ignore[attr-defined]
    return t


def marked(t: Any) -> bool:
    return isinstance(t, Tensor) and getattr(t, "_on_device", False)


class _Count:
    """How many reads are still allowed."""

    def __init__(self, allowed: int) -> None:
        self.left = allowed

    def read(self, what: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Read(what)


class _Follow(TorchDispatchMode):
    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(marked(t) for t in inputs):
            name = str(func).removeprefix("aten.")
            sized = kwargs.get("output_size") is not None
            if any(name.startswith(r) for r in READS) and not sized:
                self.count.read(name)
            masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype == torch.bool]
            if name.startswith(("index.Tensor", "index_put")) and masks:
                self.count.read(f"{name} by a mask")
        out = func(*args, **kwargs)
        if any(marked(t) for t in inputs):
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    mark(t)
        return out


@contextlib.contextmanager
def no_reads(allowed: int = 0) -> Iterator[None]:
    """Inside, reading a marked tensor, or one made from it, more often than ``allowed`` raises :class:`Read`."""
    count = _Count(allowed)
    names = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
    originals = {name: getattr(Tensor, name) for name in names}

    def guard(name: str) -> Any:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if marked(self):
                count.read(name)
            return originals[name](self, *args, **kwargs)

        return call

    try:
        for name in names:
            setattr(Tensor, name, guard(name))
        with _Follow(count):
            yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)
