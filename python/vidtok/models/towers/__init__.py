"""The vision towers of transformers whose tokens can merge: one file for each group of families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from vidtok.merge.attach import Merging
from vidtok.merge.frames import FrameMerging, kind_of
from vidtok.merge.options import ToMe
from vidtok.models import families, versions
from vidtok.models.towers import (
    _attention,
    clip,
    dinov2,
    dinov3,
    internvideo2,
    internvl,
    open_clip,
    qwen,
    siglip,
    timm,
    videomae,
    vit,
)
from vidtok.models.towers._base import Tower
from vidtok.models.towers._full import recorded
from vidtok.models.vision import timed

FAMILIES: tuple[Tower, ...] = (
    *clip.FAMILIES,
    *siglip.FAMILIES,
    *dinov2.FAMILIES,
    *dinov3.FAMILIES,
    *vit.FAMILIES,
    *videomae.FAMILIES,
    *internvl.FAMILIES,
    *qwen.FAMILIES,
    *timm.FAMILIES,
    *open_clip.FAMILIES,
    *internvideo2.FAMILIES,
)
_BY_CLASS = {(family.package, name): family for family in FAMILIES for name in family.towers}


def family_of(module: nn.Module) -> Tower | None:
    """The family of a tower, by the name of its class or of one it derives from."""
    for kind in type(module).__mro__:
        for package in ("", kind.__module__.partition(".")[0]):
            if (package, kind.__name__) in _BY_CLASS:
                return _BY_CLASS[package, kind.__name__]
    return None


def locate(model: nn.Module) -> list[tuple[nn.Module, Tower]]:
    """The towers inside ``model``, each with its family; of one inside another only the outer."""
    found: list[tuple[nn.Module, Tower]] = []
    inside: set[int] = set()
    for module in model.modules():
        family = family_of(module)
        if family is not None and id(module) not in inside:
            found.append((module, family))
            inside.update(map(id, module.modules()))
    return found


def _relied(tower: nn.Module, family: Tower, around: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose forwards merging relies on."""
    yield tower
    for block in family.find_blocks(tower):
        yield from (block, *family.attention(block))
        yield from (part for name, part in block.named_children() if name == "attention")
    yield from (part for name, part in tower.named_modules() if name.rsplit(".", 1)[-1] == "head")
    known = {*family.dense, *(name for head in family.heads for name in head.models)}
    yield from (module for module in around if known & {kind.__name__ for kind in type(module).__mro__})


def merge(
    tower: nn.Module, family: Tower, options: ToMe, full_length: bool, around: Sequence[nn.Module] = ()
) -> Merging:
    """Put token merging into a tower; ``around`` are the modules that it is in."""
    blocks = family.find_blocks(tower)
    versions.check_tower(_relied(tower, family, around))
    names = [{kind.__name__ for kind in type(module).__mro__} for module in around]
    dense = any(name & set(family.dense) for name in (*names, {type(tower).__name__}))
    full_length = full_length or family.full_length or dense
    kind = kind_of(family.kind, options, tower)
    if kind is FrameMerging and family.prefix(tower):
        # A mean over patches is one of the frame's own.
        full_length = full_length or any(name & set(head.models) for name in names for head in family.heads)
    merging = kind(tower, blocks, family.halves, options, family.prefix(tower), full_length)
    undo: list[Callable[[], None]] = []
    try:
        for block in blocks:
            undo.extend(_attention.take(attention) for attention in family.attention(block))
        for extra in family.extras:
            undo.append(extra(tower, merging))
        for head in family.heads:
            for module, name in zip(around, names, strict=True):
                if name & set(head.models):
                    undo.append(head.attach(module, tower, merging))
        if merging.full_length:
            undo.append(recorded(tower, merging))
        undo.append(timed(tower, merging))
    except BaseException:
        for back in reversed([*merging._back, *undo]):
            back()
        raise
    merging._back.extend(undo)
    return merging


def _describe(model: nn.Module) -> str:
    """A model's class, and those of its vision towers where they are known."""
    name = type(model).__name__
    try:
        own = families.locate(model).towers
    except ValueError:
        return name
    classes = dict.fromkeys(type(tower).__name__ for tower in own)
    return f"{name} with {' and '.join(classes)}" if classes else name


def attach_vision(model: nn.Module, options: Any) -> list[Merging]:
    """Put token merging into every vision tower of ``model``."""
    found = locate(model)
    if not found:
        raise ValueError(
            f"expected a model with a vision tower of a supported family (docs/vision.md lists them), got "
            f"{_describe(model)}; vidtok.merge.attach_any takes others"
        )
    # Inside a video-language model every visual token has a place in the prompt.
    full = any(hasattr(m, "get_placeholder_mask") or hasattr(m, "language_model") for m in model.modules())
    out: list[Merging] = []
    try:
        for tower, family in found:
            around = [m for m in model.modules() if m is not tower and any(part is tower for part in m.modules())]
            out.append(merge(tower, family, options, full, around))
    except BaseException:
        for merging in out:
            merging.restore()
        raise
    return out
