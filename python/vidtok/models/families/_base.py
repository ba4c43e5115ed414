"""What a family of models has to say about itself, so that one pair of hooks serves all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidtok.models.report import Span, Unit

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Media:
    """The placeholder tokens of one kind in one call, before they are told apart.

    Args:
        module: the base model.
        kind: ``"video"`` or ``"image"``.
        columns: int64 ``[n]``, packed row columns of the placeholder tokens, ascending.
        length: columns of a row.
        arguments: of the base model's forward call, by name.
        encoded: features made before the call (``generate`` does so), an output object with
            ``pooler_output``; None when pixels come with the call.
        calls: inputs of the vision tower calls that made ``encoded``: tensors of integers as they
            are, the shapes of the others; empty when they are not known.
        borders: columns of a row at which packed samples begin and end; empty for padded rows.
    """

    module: Any
    kind: str
    columns: Tensor
    length: int
    arguments: dict[str, Any]
    encoded: Any = None
    calls: Sequence[dict[str, Any]] = ()
    borders: tuple[int, ...] = ()

    def input(self, name: str) -> Any:
        """An argument of the call, or of the vision tower when features were made before; None without."""
        if self.encoded is None:
            return self.arguments.get(name)
        found = [c[name] for c in self.calls if c.get(name) is not None]
        return found[0] if len(found) == 1 else None

    def split(self, grids: Sequence[Grid]) -> list[tuple[Tensor, Grid]]:
        """The columns of each unit, when units of these grids lie one after another."""
        sizes = [t * h * w for t, h, w in grids]
        if sum(sizes) != self.columns.shape[0]:
            raise ValueError(
                f"expected {sum(sizes)} {self.kind} tokens for grids {[list(g) for g in grids]}, "
                f"got {self.columns.shape[0]} in this call (prefill_chunk_size and truncated prompts cannot be reduced)"
            )
        return [(part, grid) for part, grid in zip(self.columns.split(sizes), grids) if part.numel()]

    def apart(self, a: int, b: int) -> bool:
        """Whether two columns, ascending, belong to different rows or packed samples."""
        return a // self.length != b // self.length or any(a < border <= b for border in self.borders)

    def runs(self) -> list[Tensor]:
        """Stretches of neighbouring columns of one row."""
        if not self.columns.numel():
            return []
        step = self.columns.diff() != 1
        step |= self.columns[1:] % self.length == 0
        for border in self.borders:
            step |= self.columns[1:] == border
        ends = (torch.nonzero(step).squeeze(1) + 1).tolist()
        return list(torch.tensor_split(self.columns, ends))


#: Tells the units of one kind apart: for each, its columns (frame by frame, special tokens left out) and its grid.
Rule = Callable[[Media], list[tuple[Tensor, Grid]]]


@dataclass(frozen=True)
class Family:
    """One group of classes of transformers.

    Args:
        name: its folder in transformers.
        base: class that owns the vision tower and calls the language model.
        heads: classes with a head, which hold the base at ``inner``; the base itself when it has the head.
        units: rule that tells videos and images apart.
        inner: attribute of a head at which the base lies.
        language: attribute of the base at which the language model lies; empty when the base is it.
        flat: where the language model lies in older versions, whose head is the base itself; empty for none such.
        towers: attributes of the base at which vision towers lie, for timing and grids.
        video: config attributes with the placeholder of videos, the first that is there counts.
        image: the same of images.
        positions: ``mrope`` takes rows of (time, height, width) ids, ``rope`` one row, ``none`` none.
        base_masks: whether the base makes the 4-D attention masks.
        masks: makes them again for reduced rows, from the base, the language model's arguments and the
            kinds of the tokens; without it they are cut out of those that the base made.
        images: whether ``images=true`` may reduce images; their grids are known then.
        tagged: whether the output of a tower is what ``generate`` hands over, or one built anew from it.
        frames: whether videos come as images, one per frame; images of one frame are images then.
        spans: config attributes with the tokens before and after a video, where videos have the placeholder of images.
        unpadded: types of layers that take padding for tokens, so that reduced rows have to be of one length.
        text_positions: whether flash attention is given text positions, by which it tells packed samples apart.
        plain: whether it is a language model only, whose visual tokens the caller names.
        since: first version of transformers whose classes of this family are taken.
    """

    name: str
    base: str
    heads: tuple[str, ...]
    units: Rule
    inner: str = "model"
    language: str = "language_model"
    flat: str = ""
    towers: tuple[str, ...] = ("visual",)
    video: tuple[str, ...] = ("video_token_id", "video_token_index")
    image: tuple[str, ...] = ("image_token_id", "image_token_index")
    positions: Literal["mrope", "rope", "none"] = "mrope"
    base_masks: bool = False
    masks: Callable[[Any, dict[str, Any], Tensor | None], Any] | None = None
    images: bool = True
    tagged: bool = True
    frames: bool = False
    spans: tuple[str, ...] = ()
    unpadded: tuple[str, ...] = ()
    text_positions: bool = True
    plain: bool = False
    since: tuple[int, int] = (4, 57)
    notes: tuple[str, ...] = field(default=())

    def placeholder(self, config: Any, kind: str) -> int | None:
        """Token id of a kind's placeholder, None for a kind that the family does not have."""
        for name in self.video if kind == "video" else self.image:
            value = getattr(config, name, None)
            if value is not None:
                return int(value)
        return None


@dataclass(frozen=True)
class Places:
    """The modules that hooks go on."""

    family: Family
    outer: nn.Module | None
    base: nn.Module
    language_model: nn.Module
    towers: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Visual:
    """Visual tokens of a batch: packed row columns unit by unit, ascending, and the units."""

    columns: Tensor
    units: list[Unit]
    sizes: list[int]


@dataclass(frozen=True)
class Encoded:
    """Inputs and time of a vision tower call, carried by its output object until the prefill."""

    inputs: dict[str, Any]
    span: Span | None


def grid_units(merge: str = "spatial_merge_size", temporal: str = "") -> Rule:
    """Units of ``video_grid_thw`` and ``image_grid_thw``.

    Args:
        merge: attribute of the vision config: patches of a token's side.
        temporal: the same: grid steps of a video that become one; empty for one.
    """

    def rule(media: Media) -> list[tuple[Tensor, Grid]]:
        grids = media.input("grid_thw" if media.encoded is not None else f"{media.kind}_grid_thw")
        if grids is None:
            raise ValueError(
                f"expected visual features with their grids ({media.kind}_grid_thw), got features made before attach "
                "or split by prefill_chunk_size, which cannot be reduced"
            )
        vision = media.module.config.vision_config
        side = int(getattr(vision, merge))
        steps = int(getattr(vision, temporal)) if temporal and media.kind == "video" else 1
        rows = [(int(t) // steps, int(h) // side, int(w) // side) for t, h, w in grids.tolist()]
        return media.split(repeated(joined(rows, media.encoded), media.encoded))

    return rule


def joined(rows: list[Grid], encoded: Any) -> list[Grid]:
    """Grids of a tower that was given each frame alone, put together to those of the units."""
    parts = getattr(encoded, "pooler_output", None)
    if not isinstance(parts, (list, tuple)) or len({id(part) for part in parts}) >= len(rows):
        return rows
    out: list[Grid] = []
    start = 0
    for size in (len(part) for part in {id(part): part for part in parts}.values()):
        t, h, w = 0, *rows[start][1:]
        while start < len(rows) and rows[start][1:] == (h, w) and (t + rows[start][0]) * h * w <= size:
            t, start = t + rows[start][0], start + 1
        if t * h * w != size:
            return rows
        out.append((t, h, w))
    return out if start == len(rows) else rows


def repeated(rows: list[Any], encoded: Any) -> list[Any]:
    """Rows of one entry per unit, repeated as beam search repeats the features of a sample.

    The repeated features are the same tensor objects.
    """
    parts = getattr(encoded, "pooler_output", None)
    if not isinstance(parts, (list, tuple)) or len(parts) == len(rows):
        return rows
    order: dict[int, int] = {}
    return [rows[order.setdefault(id(part), len(order))] for part in parts]
