"""Key/value caches that know two lengths.

After a reduction the cache holds fewer tokens than the caller fed. What generation code asks,
``get_seq_length()``, stays *logical* (tokens fed), so that slicing of inputs and positions go on as
without reduction; what attention masks are sized by stays *physical* (tokens held).
"""

from __future__ import annotations

import copy
import weakref
from bisect import bisect_right
from functools import cache as memo
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidtok import _check

if TYPE_CHECKING:
    from vidtok.models.report import Record

_STATE = "_vidtok"
#: On classes that stand in for the class of a cache, which pickle cannot find by name.
_LENT = "_vidtok_lent"


class Stages:
    """What the layers behind drops inside the decoder hold.

    Args:
        entries: per drop, the layer before which tokens left, ascending.
        dropped: per drop, how many columns fewer its layers hold than the layers before all drops.
        masks: per drop, bool ``[B, W]`` as :class:`State` has one for the layers before them.
        floor: columns of the layers before all drops below which columns no longer stand for one fed token each.
        records: what the drops did.
        columns: per drop, int64 ``[B, W]``: what its layers hold, in columns of the layers before all drops; None
            unless a layer needs the positions of its keys again.
    """

    __slots__ = ("columns", "dropped", "entries", "floor", "masks", "records")

    def __init__(
        self, entries: tuple[int, ...], dropped: list[int], masks: list[Tensor | None], floor: int, records: Any = None
    ) -> None:
        self.entries, self.dropped, self.masks, self.floor, self.records = entries, dropped, masks, floor, records
        self.columns: list[Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Stages:
        masks = [None if mask is None else mask.clone() for mask in self.masks]
        copied = Stages(self.entries, list(self.dropped), masks, self.floor, self.records)
        copied.columns = self.columns
        return copied

    def at(self, layer: int) -> int:
        """Columns that ``layer`` holds fewer than the first."""
        behind = bisect_right(self.entries, layer)
        return self.dropped[behind - 1] if behind else 0

    def change(self, function: Any) -> None:
        """Apply a function to what there is of every column."""
        self.masks = [None if mask is None else function(mask) for mask in self.masks]
        self.columns = None if self.columns is None else [function(held) for held in self.columns]


class State:
    """What a cache has to know about the reductions that filled it.

    Args:
        reduced: whether it holds a reduced prompt; a cache that does not only counts time.
        mask: bool ``[B, W]``, True for columns that hold a real token; ``W`` is the physical length,
            or the capacity of a static cache. None when all do.
        dropped: columns that the caller fed and the cache does not hold.
        length: physical columns filled, for caches that count on the device.
        floor: physical length below which columns no longer stand for one fed token each.
        owner: the attachment that knows how to read this cache.
        record: where decoding time is added.
        stages: what the layers behind drops inside the decoder hold; None without such drops.
    """

    __slots__ = ("dropped", "floor", "length", "mask", "owner", "record", "reduced", "stages")

    def __init__(
        self,
        owner: Any,
        record: Record | None,
        *,
        reduced: bool = False,
        mask: Tensor | None = None,
        dropped: int = 0,
        length: int = 0,
        floor: int = 0,
        stages: Stages | None = None,
    ) -> None:
        self.stages = stages
        self.reduced, self.mask, self.dropped, self.length, self.floor = reduced, mask, dropped, length, floor
        self.owner = owner if isinstance(owner, weakref.ref) else weakref.ref(owner)
        self.record = record

    def __deepcopy__(self, memo: Any) -> State:
        return State(
            self.owner,
            self.record,
            reduced=self.reduced,
            mask=None if self.mask is None else self.mask.clone(),
            dropped=self.dropped,
            length=self.length,
            floor=self.floor,
            stages=copy.deepcopy(self.stages),
        )

    def __reduce__(self) -> Any:
        raise ValueError("expected a cache of an unreduced prompt, got one that an attached model has to continue")

    def select(self, index: Tensor) -> None:
        """Reorder or repeat the rows."""
        if self.mask is not None:
            self.mask = self.mask.index_select(0, index.to(self.mask.device))
        if self.stages is not None:
            self.stages.change(lambda mask: mask.index_select(0, index.to(mask.device)))


def state_of(cache: Any) -> State | None:
    """The state on a cache, None on a cache that no reduction has touched."""
    if cache is not None and not hasattr(cache, "layers"):
        _check.fail("past_key_values as a transformers Cache", type(cache).__name__, TypeError)
    return None if cache is None else cache.__dict__.get(_STATE)


def is_static(cache: Any) -> bool:
    """Whether the cache is a fixed buffer that may hold more columns than are filled."""
    return bool(getattr(cache, "is_compileable", False))


def capacity(cache: Any) -> int | None:
    """Columns of a static cache's full-attention layers; None for a growing cache, and without such layers."""
    if not is_static(cache):
        return None
    # Sliding layers let go of old columns; recurrent ones hold none.
    sizes = [layer.max_cache_len for layer in cache.layers if not getattr(layer, "is_sliding", True)]
    return max(sizes, default=None)


def physical_length(cache: Any) -> int:
    """Columns that the cache holds, in the layers before any drop inside the decoder."""
    if cache is None:
        return 0
    state = state_of(cache)
    if state is not None and state.reduced and is_static(cache):
        return state.length
    stages = None if state is None else state.stages
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            return int(layer.get_seq_length()) + (0 if stages is None else stages.at(i))
    return 0


def bind(cache: Any, state: State) -> None:
    """Put ``state`` on a cache; a reduced one answers with its logical length from now on."""
    if (state.reduced or state.stages is not None) and not isinstance(cache, TwoLengths):
        base: Any = type(cache)
        cache.__class__ = _two_lengths(base)
    cache.__dict__[_STATE] = state


def bind_stages(cache: Any, stages: Stages) -> None:
    """Tell a cache, which has a state, what its layers hold after drops inside the decoder."""
    state = state_of(cache)
    assert state is not None
    state.stages = stages
    bind(cache, state)


class TwoLengths:
    """Mixed into the class of a cache that holds a reduced prompt."""

    def _state(self) -> State | None:
        return self.__dict__.get(_STATE)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that the caller fed."""
        state = self._state()
        held = super().get_seq_length(layer_idx)  # type: ignore[misc]
        if state is None:
            return held
        return held + state.dropped + (0 if state.stages is None else state.stages.at(self._counting(layer_idx)))

    @property
    def logical_length(self) -> int:
        """Tokens that the caller fed, as ``get_seq_length()`` answers: what positions and inputs are counted by."""
        return int(self.get_seq_length())

    @property
    def physical_lengths(self) -> list[int]:
        """Tokens that each layer holds: what memory and attention masks are counted by; 0 for recurrent layers."""
        state, layers = self._state(), self.layers  # type: ignore[attr-defined]
        if state is not None and state.reduced and is_static(self):
            stages = state.stages
            return [state.length - (0 if stages is None else stages.at(i)) for i in range(len(layers))]
        return [int(x.get_seq_length()) if getattr(x, "keys", None) is not None else 0 for x in layers]

    def _counting(self, layer_idx: int) -> int:
        """The layer that answers for ``layer_idx``: recurrent ones do not count tokens."""
        layers: Any = self.layers  # type: ignore[attr-defined]
        known = range(layer_idx, len(layers))
        return next((i for i in known if hasattr(layers[i], "get_seq_length")), layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Tokens that the cache holds."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """Sizes of the mask over the tokens that the cache holds."""
        state = self._state()
        owner = None if state is None else state.owner()
        touched = state is not None and (state.reduced or state.stages is not None)
        if touched and (owner is None or not owner.active):
            raise ValueError(
                "expected a cache that this model filled, got one of a reduced prompt whose attachment was removed; "
                "start from an empty cache"
            )
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def crop(self, max_length: int) -> Any:
        """Remove tokens from the end: ``-n`` of them, or all beyond the logical length ``max_length``."""
        state = self._state()
        if state is None or max_length == 0:
            return super().crop(max_length)  # type: ignore[misc]
        held = physical_length(self)
        kept = max_length - state.dropped if max_length > 0 else held + max_length
        if kept >= held:
            return None
        floor = max(state.floor, 0 if state.stages is None else state.stages.floor)
        if kept < floor:
            raise ValueError(
                f"expected to keep at least {floor + state.dropped} tokens of a reduced prompt, "
                f"got a crop to {kept + state.dropped}"
            )
        if state.mask is not None:
            state.mask = state.mask[:, :kept]
        if state.stages is not None:
            state.stages.change(lambda mask: mask[:, : mask.shape[1] - (held - kept)])
        return super().crop(kept - held)  # type: ignore[misc]

    def reset(self) -> None:
        """Empty the cache; what it knew about a reduction goes with the tokens."""
        self.__dict__.pop(_STATE, None)
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        state = self._state()
        if state is not None:
            state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        state = self._state()
        if state is not None:
            state.select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        state = self._state()
        if state is not None and state.mask is not None:
            state.mask = state.mask.repeat_interleave(repeats, dim=0)
        if state is not None and state.stages is not None:
            state.stages.change(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        if _LENT in vars(cls):
            return _rebuild, (cls.__mro__[2],), dict(self.__dict__)
        return super().__reduce_ex__(protocol)


def _rebuild(base: Any) -> Any:
    cls: Any = _two_lengths(base)
    return cls.__new__(cls)


@memo
def _two_lengths(base: Any) -> Any:
    body = {"__module__": base.__module__, "__doc__": base.__doc__, _LENT: True}
    return type(base.__name__, (TwoLengths, base), body)


@memo
def logical_cache() -> Any:
    """The class :class:`LogicalCache`, made when transformers is there."""
    from transformers import DynamicCache

    doc = """A growing cache that knows two lengths, for several turns of one conversation.

    ``get_seq_length()`` and :attr:`logical_length` count the tokens that were fed, :attr:`physical_lengths` those that
    each layer holds. Arguments are those of transformers' ``DynamicCache``; without an attachment it is one.

    Example:
        >>> cache = vidtok.LogicalCache(config=model.config)  # doctest: +SKIP
        >>> with vidtok.attach(model, visual="uniform:ratio=0.25"):
        ...     model.generate(**first_turn, past_key_values=cache)
        ...     model.generate(**second_turn, past_key_values=cache)
        ...     print(cache.logical_length, cache.physical_lengths)
    """
    return type("LogicalCache", (TwoLengths, DynamicCache), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    # transformers is imported by those who use it.
    if name == "LogicalCache":
        return logical_cache()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
