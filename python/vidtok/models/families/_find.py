"""Finding the visual tokens of a call."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.models import cache as caches
from vidtok.models.families._base import Encoded, Family, Media, Visual
from vidtok.models.report import Span, Unit

_TAG = "_vidtok_encoded"
_PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return kwargs
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    return {**dict(zip(names, args)), **kwargs}


def tower_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a vision tower's arguments: integers, and the shapes of other tensors."""
    kept: dict[str, Any] = {}
    for name, value in named_arguments(module, args, kwargs).items():
        if isinstance(value, Tensor):
            kept[name] = value.shape if value.is_floating_point() else value
    return kept


def tag(output: Any, encoded: Encoded) -> None:
    """Let the output object of a vision tower carry its inputs; ``generate`` hands over nothing else."""
    if hasattr(output, "pooler_output"):
        setattr(output, _TAG, (*getattr(output, _TAG, ()), encoded))


def tags(arguments: dict[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], list[Span]]:
    """Inputs by kind, and times, of the vision tower calls whose outputs came with the arguments."""
    calls: dict[str, list[dict[str, Any]]] = {}
    spans: list[Span] = []
    for kind, output in (arguments.get("mm_encoder_outputs") or {}).items():
        for encoded in getattr(output, _TAG, ()):
            calls.setdefault(kind, []).append(encoded.inputs)
            if encoded.span is not None:
                spans.append(encoded.span)
    return calls, spans


def has_media(arguments: dict[str, Any]) -> bool:
    """Whether pixels or their features come with this call."""
    return any(arguments.get(name) is not None for name in _PIXELS.values()) or bool(
        arguments.get("mm_encoder_outputs")
    )


def refuse_blind(family: Family, module: Any, arguments: dict[str, Any]) -> None:
    """Raise for a prompt whose video tokens come without pixels, as prefill_chunk_size makes them on 5.17."""
    ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
    token = family.placeholder(module.config, "image" if family.frames else "video")
    if token is None or ids is None or ids.shape[1] < 2 or cache is None or caches.physical_length(cache):
        return
    if bool((ids == token).any()):
        raise ValueError(
            "expected pixels with the video tokens of a new prompt, got none (prefill_chunk_size cannot be reduced)"
        )


def _foreign(family: Family, output: Any) -> bool:
    """Whether features that no hook has seen in the making are not those of whole videos and images.

    A model may build its output anew from what the tower made; of a chunk, it is a list of one part.
    """
    parts = getattr(output, "pooler_output", None)
    return family.tagged or (isinstance(parts, list) and len(parts) == 1)


def _is(module: Any, ids: Tensor | None, embeds: Tensor | None, token: int) -> Tensor:
    """bool ``[B, L]``: where a token stands."""
    if ids is not None:
        return ids == token
    assert embeds is not None
    vector = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return (embeds == vector).all(-1)


def find_visual(
    family: Family,
    module: Any,
    arguments: dict[str, Any],
    images: bool,
    calls: dict[str, list[dict[str, Any]]],
    borders: tuple[int, ...] = (),
) -> Visual | None:
    """Visual tokens of a call to the base model, in packed order.

    Args:
        family: of the model.
        module: the base model.
        arguments: of its forward call, by name.
        images: whether images count too.
        calls: inputs of the vision tower calls made before, by kind.
        borders: columns at which packed samples begin and end; empty for padded rows.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    encoded = arguments.get("mm_encoder_outputs") or {}
    length = ids.shape[1] if ids is not None else embeds.shape[1]  # type: ignore[union-attr]
    found: list[tuple[int, Tensor, Unit]] = []
    for kind, pixels in _PIXELS.items():
        if (family.frames and kind == "video") or (kind == "image" and not (images or family.frames)):
            continue
        if encoded.get(kind) is None and arguments.get(pixels) is None:
            continue
        if encoded.get(kind) is not None and not calls.get(kind) and _foreign(family, encoded[kind]):
            raise ValueError(
                "expected visual features as the vision tower made them, got features made before attach or split by "
                "prefill_chunk_size, which cannot be reduced"
            )
        token = family.placeholder(module.config, kind)
        if token is None:
            continue
        place = _is(module, ids, embeds, token)
        if family.spans:
            begun, ended = (_is(module, ids, embeds, getattr(module.config, name)).cumsum(-1) for name in family.spans)
            place &= (begun > ended) == (kind == "video")
        columns = torch.nonzero(place.reshape(-1)).squeeze(1)
        media = Media(module, kind, columns, length, arguments, encoded.get(kind), calls.get(kind, ()), borders)
        parts = [(part, grid) for part, grid in family.units(media) if part.numel()]
        kinds = ["video" if family.frames and grid[0] > 1 else kind for _, grid in parts]
        starts = torch.stack([part[0] for part, _ in parts]).tolist() if parts else []
        found += [
            (s, part, Unit(what, s // length, grid))
            for s, (part, grid), what in zip(starts, parts, kinds)
            if images or what == "video"
        ]
    if not found:
        return None
    found.sort(key=lambda item: item[0])
    return Visual(
        torch.cat([part for _, part, _ in found]), [unit for _, _, unit in found], [len(part) for _, part, _ in found]
    )


def without_newlines(module: Any, visual: Visual, embeds: Tensor) -> Visual:
    """``visual`` without the newlines that some models put between the rows of an image's tiles: they stay.

    Args:
        module: the base model; its ``image_newline`` is what a newline's embedding is.
        visual: of a call.
        embeds: ``[B, L, C]``, what the language model is given.
    """
    vector = getattr(module, "image_newline", None)
    if vector is None or all(unit.kind == "video" for unit in visual.units):
        return visual
    at = visual.columns.to(embeds.device)
    own = ~(embeds.flatten(0, 1)[at] == vector.to(embeds)).all(-1)
    kept = [part[mask] for part, mask in zip(visual.columns.split(visual.sizes), own.cpu().split(visual.sizes))]
    sizes = [part.numel() for part in kept]
    units = [
        unit if n == old else replace(unit, grid_thw=(1, 1, n))
        for unit, n, old in zip(visual.units, sizes, visual.sizes)
    ]
    return Visual(torch.cat(kept), units, sizes)
