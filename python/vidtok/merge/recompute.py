"""Which forward pass a block belongs to when a checkpoint computes it again in the backward pass.

A checkpoint keeps the tokens that its block got, so the pass is noted on the storage that holds them: it is
forgotten when the graph is, and another pass in between does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NAME = "_vidtok_runs"


def recomputing() -> bool:
    """Whether the backward pass runs, inside which a block is only called to be computed again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def remember(x: Tensor, owner: object, run: Any) -> None:
    """Note that ``x`` entered a block of ``owner`` as part of ``run``."""
    if not torch.compiler.is_compiling() and type(x) is Tensor:
        storage = x.untyped_storage()
        # The dictionary is new each time: passes before this one may share the storage of a leaf.
        setattr(storage, _NAME, {**getattr(storage, _NAME, {}), _place(x, owner): run})


def recall(x: Tensor, owner: object) -> Any:
    """The run that ``x`` entered a block of ``owner`` as part of; None where it did not."""
    return getattr(x.untyped_storage(), _NAME, {}).get(_place(x, owner)) if type(x) is Tensor else None


def _place(x: Tensor, owner: object) -> tuple[Any, ...]:
    """Parts of one batch share a storage."""
    return id(owner), x.storage_offset(), x.shape
