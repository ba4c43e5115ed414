"""What a layer behind a drop is given: masks, positions and the rest, for the columns that are left."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.models import cache as caches
from vidtok.models import layers, masks
from vidtok.models import packed as packing
from vidtok.models.run import Run, Step
from vidtok.plan import Plan

# Arguments with which a pass that drops nothing has more to do than to make masks.
_MORE = frozenset({"cache_position", "past_key_value", *layers.LOCAL_MASKS, *layers.HANDED_ON, *layers.PADDED_WITH_EOS})
_PLAIN = frozenset({*layers.ATTENTION, "linear_attention", "none"})


def remembers(cache: Any) -> bool:
    """Whether layers are given the positions of everything in the cache, too."""
    found = getattr(cache, "layers", ())
    return any(getattr(layer, "indexer_position_ids", None) is not None for layer in found)


class Following:
    """Makes the arguments of layers behind drops.

    Args:
        found: the layers.
        position: ``keep`` or ``renumber``.
    """

    def __init__(self, found: layers.Layers, position: str) -> None:
        self.layers, self.position = found, position

    def later(self, run: Run, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer in a pass that drops nothing, by a short way; None where more than masks change."""
        if len(args) != 1 or self.position != "keep" or not _MORE.isdisjoint(kwargs):
            return None
        kind = self.layers.kinds[index]
        if kind not in _PLAIN:
            return None
        step = run.current(index)
        out = dict(kwargs)
        if step is None:
            return args, out
        for name in layers.MASKS:
            if name in out:
                out[name] = self._mask(run, step, index, args[0], kwargs.get("past_key_values"), kind)
        return args, out

    def arguments(self, run: Run, step: Step, index: int, hidden: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer behind a drop."""
        out = dict(arguments)
        cache = arguments.get("past_key_values", arguments.get("past_key_value"))
        rotated = arguments.get("position_embeddings") is not None or self.layers.rotary is not None
        for name, value in arguments.items():
            if name in layers.MASKS:
                out[name] = self._mask(run, step, index, hidden, cache, _mask_kind(self.layers.kinds[index], value))
            elif name in layers.LOCAL_MASKS:
                out[name] = self._mask(run, step, index, hidden, cache, "linear_attention")
            elif value is None:
                continue
            elif name in layers.HANDED_ON:
                # Keys are counted anew behind a drop.
                out[name] = None if index in run.entries else value
            elif name in layers.PADDED_WITH_EOS and step.total is not None:
                out[name] = self._padded(run, step, value)
            elif name == "position_embeddings" and remembers(cache):
                out[name] = self._remembered(run, step, value)
            elif name in packing.LENGTHS and step.packed is not None:
                out[name] = step.packed.length(name, value)
            elif name == "cache_position":
                out[name] = torch.arange(step.past, step.past + step.width, device=value.device)
            elif name == "position_ids":
                if rotated and value.dim() == 2:
                    # Consecutive: flash-attention would read gaps as borders between packed rows.
                    if step.total is not None or self.position == "renumber":
                        out[name] = step.number(run)
                elif self.position == "renumber":
                    out[name] = step.number(run).expand(value.shape[:-2] + step.number(run).shape)
                elif step.total is not None:
                    out[name] = self._positions(run, step, value)
            elif name.startswith("position_embeddings") and self.position == "renumber":
                out[name] = self._rotate(run, step, index, hidden, name)
            elif step.total is not None and any(t.requires_grad for t in layers.tensors(value)):
                # Made anew in a recomputation, which has to save the same tensors and to hand gradients on.
                out[name] = _follow(run, step, name, value)
            elif step.total is not None:
                out[name] = run.once((step.stage, name, id(value)), value, functools.partial(_follow, run, step, name))
        return out

    @staticmethod
    def _positions(run: Run, step: Step, value: Tensor) -> Tensor:
        assert step.total is not None
        kept: Tensor = layers.take(run.on(step.total, value.device), value, -1)
        if kept.dim() == 3 and kept.shape[0] == 4:
            kept = torch.cat([step.number(run)[None].to(kept.device), kept[1:]])
        return kept

    def _padded(self, run: Run, step: Step, value: Tensor) -> Tensor:
        """Token ids whose padding has to end what comes before."""
        assert step.total is not None
        end = self.layers.config.eos_token_id
        out: Tensor = layers.take(
            run.on(step.total, value.device), value, 1, fill=end[0] if isinstance(end, (list, tuple)) else end
        )
        return out

    def _remembered(self, run: Run, step: Step, value: Any) -> Any:
        """cos and sin of everything that the layers behind a drop hold."""
        if self.position == "renumber":
            _check.fail("position='keep' for layers that index their keys by position", "renumber")

        def make(_: Any) -> Any:
            at = run.held(step.stage).to(value[0].device)[..., None]
            return tuple(part.expand(run.batch, -1, -1).gather(1, at.expand(-1, -1, part.shape[-1])) for part in value)

        return run.once((step.stage, "held", id(value)), value, make)

    def _mask(self, run: Run, step: Step, index: int, hidden: Tensor, cache: Any, kind: str) -> Any:
        key = (step.stage, "mask", kind, hidden.device, cache is None)
        if key in run.memo:
            return run.memo[key][1]
        hidden = layers.streams(self.layers.modules[index], hidden)[0]

        def make(_: Any) -> Any:
            packed = None if step.packed is None else step.number(run).to(hidden.device)
            layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
            mask = None if step.mask is None or packed is not None else step.mask.to(hidden.device)
            made = masks.build(self.layers.config, kind, hidden, mask, step.past, layer, packed)
            pairs = step.pairs(run, kind)
            if pairs is None:
                return made
            first = step.past if caches.is_static(cache) else None
            return masks.with_blocks(made, pairs.to(hidden.device), hidden, step.past, first)

        return run.once(key, None, make)

    def _rotate(self, run: Run, step: Step, index: int, hidden: Tensor, name: str) -> Any:
        """cos and sin of the tokens that are left, counted anew."""
        kind = self.layers.kinds[index]

        def make(_: Any) -> Any:
            number = step.number(run).to(hidden.device)
            rotary: Any = getattr(self.layers.owner, "rotary_emb_local", None) if name.endswith("local") else None
            rotary = rotary or self.layers.rotary
            if rotary is None:
                raise ValueError(
                    "expected a rotary embedding of the language model to renumber positions with, got none"
                )
            extra = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
            # forward() itself: hooks on the module put in the positions of the whole rows.
            return rotary.forward(hidden, number.expand(3, -1, -1) if run.mrope else number, **extra)

        return run.once((step.stage, name, kind, hidden.device), None, make)


def _mask_kind(kind: str, mask: Any) -> str:
    """Some layers that index their keys take only what is padding in this pass."""
    return "local" if kind == "indexed_attention" and isinstance(mask, Tensor) and mask.dim() == 2 else kind


def _follow(run: Run, step: Step, name: str, value: Any) -> Any:
    tensor = next(layers.tensors(value), None)
    if tensor is None:
        return value
    total: Plan | None = step.total
    assert total is not None
    return layers.follow(name, value, run.on(total, tensor.device), run.length)
