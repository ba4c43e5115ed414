"""Keys and values of the layers before a drop, shrunk to the tokens that stayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.models import cache as caches
from vidtok.models.run import Run, Step
from vidtok.plan import Plan


def check(cache: Any) -> None:
    """Refuse caches whose columns cannot be taken out.

    Raises:
        ValueError: for static, quantised and sliding caches, in one sentence.
    """
    if cache is None:
        return
    if caches.is_static(cache):
        raise ValueError("expected a cache that grows with compress=True, got a static one")
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            raise ValueError(f"expected full attention in all layers with compress=True, got a window in layer {i}")
        if hasattr(layer, "_quantized_keys") or "Quantized" in type(layer).__name__:
            raise ValueError(f"expected an unquantised cache with compress=True, got {type(layer).__name__}")


@torch.no_grad()
def compress(cache: Any, run: Run) -> None:
    """After a prefill, leave in every layer what the last drop left, and tell the cache so.

    Layers behind the last drop hold that already. The cache then is as if its prompt had been reduced
    before the first layer: one physical length, and a logical one.
    """
    last = run.last()
    state = caches.state_of(cache)
    assert state is not None
    if last.total is None:
        return
    for i, layer in enumerate(cache.layers):
        keys = getattr(layer, "keys", None)
        step = run.current(i) or run.base
        plan = _between(run, step, last)
        if keys is None or keys.numel() == 0 or plan is None:
            continue
        if keys.shape[-2] != step.past + step.width:
            _check.fail(f"{step.past + step.width} columns in layer {i} of the cache", str(keys.shape[-2]))
        layer.keys, layer.values = (_left(x, plan, step, last, run.batch) for x in (layer.keys, layer.values))
    state.reduced, state.mask = True, last.mask
    state.dropped += run.length - last.width
    state.length = last.past + last.width
    state.floor = run.floor - (run.length - last.width)
    state.stages = None
    caches.bind(cache, state)


def _between(run: Run, step: Step, last: Step) -> Plan | None:
    """From the columns of a step to those of the last one; None when they are the same."""
    plan: Plan | None = None
    for stage in range(step.stage + 1, last.stage + 1):
        rows = run.at(stage).rows
        if rows is not None:
            plan = rows if plan is None else plan.compose(rows)
    return plan


def _left(x: Tensor, plan: Plan, step: Step, last: Step, batch: int) -> Tensor:
    """``[B, H, past + L, D]`` to ``[B, H, past + L', D]``."""
    at = plan.anchor.long().view(batch, last.width).to(x.device)
    at = torch.where(at < 0, 0, at % step.width) + step.past
    past = torch.arange(step.past, device=x.device).expand(batch, -1)
    index = torch.cat([past, at], 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
