"""Heads that pool over tokens, each counted as often as the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.merge.run import weighted_mean
from vidtok.models.towers._full import _Hook
from vidtok.models.towers._masks import gather

Undo = Callable[[], None]


def sizes(merging: Any) -> Tensor | None:
    """fp32 ``[B, T']`` of the tokens that a head gets; None where each stands for itself."""
    return None if merging.full_length else merging.size


def _before(module: nn.Module, run: Callable[..., Any]) -> Any:
    return module.register_forward_pre_hook(_Hook(run), with_kwargs=True)


def _remove(handles: list[Any]) -> Undo:
    def undo() -> None:
        while handles:
            handles.pop().remove()

    return undo


def pooling_attention(*names: str) -> Callable[[Any, Any], Undo]:
    """An extra for towers whose head, the first of ``names``, pools with a query of its own: log(size) on its keys."""

    def extra(tower: Any, merging: Any) -> Undo:
        head = next((h for h in (_find(tower, name) for name in names) if h is not None), None)
        if head is None:
            return lambda: None

        def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """A mask of padding as the tower got it becomes one of the tokens that are left."""
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if mask is None or sizes(merging) is None or mask.shape[-1] == args[0].shape[1]:
                return None
            place = merging.run.place[-1]
            # Without places the tower saw that there is no padding.
            mask = mask[:, : args[0].shape[1]] if place is None else gather(mask, place)
            rest = {key: value for key, value in kwargs.items() if key != "attention_mask"}
            return (args[0], mask, *args[2:]), rest

        def weigh(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            size = sizes(merging)
            if size is None:
                return None
            bias = size.log().to(args[0].dtype).repeat_interleave(module.num_heads, 0)[:, None]
            mask = kwargs.get("attn_mask")
            return args, {**kwargs, "attn_mask": bias if mask is None else mask + bias}

        return _remove([_before(head, follow), _before(head.attention, weigh)])

    return extra


def _find(module: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None


@dataclass(frozen=True)
class Head:
    """A model around a tower that pools the tower's tokens itself.

    Args:
        models: class names of the model.
        module: name of its module that gets the pooled tokens.
        pool: what that module gets: ``(tokens [B, T', C], fp32 sizes [B, T'], prefix) -> Tensor``.
    """

    models: tuple[str, ...]
    module: str
    pool: Callable[[Tensor, Tensor, int], Tensor]

    def attach(self, outer: Any, tower: nn.Module, merging: Any) -> Undo:
        """Weigh by size what ``outer`` pools."""
        consumer = getattr(outer, self.module, None)
        if consumer is None:
            return lambda: None
        # The tower's tokens, inside a call of the model.
        tokens: list[Tensor | None] = []

        def open_(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens.append(None)

        def see(module: nn.Module, args: Any, out: Any) -> None:
            if tokens:
                tokens[-1] = out[0]

        def weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            size = sizes(merging)
            if not tokens or tokens[-1] is None or size is None:
                return None
            return (self.pool(tokens[-1], size, merging.prefix), *args[1:]), kwargs

        def close(module: nn.Module, args: Any, out: Any) -> None:
            tokens.clear()

        return _remove(
            [
                _before(outer, open_),
                tower.register_forward_hook(_Hook(see)),
                _before(consumer, weigh),
                outer.register_forward_hook(_Hook(close), always_call=True),
            ]
        )


def mean(x: Tensor, size: Tensor, prefix: int) -> Tensor:
    """Mean over the tokens that are not prefix."""
    return weighted_mean(x, size, prefix)


def class_and_mean(x: Tensor, size: Tensor, prefix: int) -> Tensor:
    """The class token, and the mean over the patches."""
    return torch.cat([x[:, 0], weighted_mean(x, size, prefix)], 1)
