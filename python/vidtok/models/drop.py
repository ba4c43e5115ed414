"""Which visual tokens leave the decoder, where, and by which rule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from torch import nn

from vidtok import _check
from vidtok.spec import _LONGEST, SpecError, _fail, _nearest

__all__ = ["PRESETS", "Drop", "SpecError", "Stage", "resolve_drop"]

KINDS = ("uni", "attn")
# Kinds of layers whose input has queries and keys for every token.
ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")
_LAYER = re.compile(r"[0-9]{1,6}", re.ASCII)
_RATIO = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20}", re.ASCII)
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "query": ("last", "turns", "question"),
    "norm": (True, False),
    "rope": (True, False),
    "layer": ("own", "previous", "after"),
    "reduce": ("mean", "max"),
    "budget": ("item", "frame", "sample", "group"),
    "convention": ("keep", "drop"),
    "rounding": ("int", "int_min1", "round"),
    "base": ("original", "current"),
    "compress": (False, True),
}


def _bundle(**options: Any) -> Mapping[str, Any]:
    common = {"query": "last", "norm": False, "rope": False, "layer": "own", "reduce": "mean", "budget": "item"}
    return MappingProxyType({**common, "rounding": "int", "base": "original", "compress": False, **options})


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "timeviper": _bundle(),
        "pyramiddrop": _bundle(query="turns", norm=True, rope=True),
        "fastv": _bundle(norm=True, rope=True, layer="previous", rounding="round"),
        "vscan": _bundle(norm=True, base="current"),
        "prunevid": _bundle(
            query="question",
            norm=True,
            rope=True,
            layer="after",
            reduce="max",
            budget="group",
            base="current",
            compress=True,
        ),
    }
)


@dataclass(frozen=True)
class Stage:
    """One drop: its kind (``uni`` or ``attn``), 0-based layer, ratio as written, and the text it came from."""

    kind: str
    layer: int
    ratio: float
    text: str

    def __str__(self) -> str:
        ratio = format(Decimal(repr(self.ratio)), "f")
        return f"{self.kind}_{self.layer}_{ratio.removesuffix('.0')}"


@dataclass(frozen=True)
class Drop:
    r"""Drops of visual tokens inside a decoder: ``type_layer_ratio-type_layer_ratio-…``.

    Before 0-based layer n, keep :math:`\max(1, \lfloor ratio \cdot N \rfloor)` of the :math:`N` visual
    tokens of a budget that entered the decoder: ``uni`` at the places :math:`\lfloor i (c-1)/(m-1) \rfloor`
    of the c present (m kept, integer arithmetic), ``attn`` those to which the query row pays most
    attention, softmax over everything that the row sees, equal scores in order of place. Kept tokens
    stay in order; text is never dropped.

    Args:
        spec: stages with ascending layers and ratios in (0, 1] that do not rise.
        preset: a bundle of the options below with the rules of a published system; options given here
            override it. None: as ``timeviper``, but never fewer than one token.

            ============  =======================  ==========  =======  ==========================  ==========
            preset        query row                norm, rope  layer    count                       heads
            ============  =======================  ==========  =======  ==========================  ==========
            timeviper     last                     no, no      own      int(ratio · original)       mean
            pyramiddrop   last; training: turns    yes, yes    own      int(ratio · original)       mean
            fastv         last                     yes, yes    previous round(ratio · original)     mean
            vscan         last                     yes, no     own      int(ratio · present)        mean
            prunevid      all of the question      yes, yes    after    int(ratio · present), of    max, also
                          (compress)                                    each group of stage 1       over rows
            ============  =======================  ==========  =======  ==========================  ==========
        query: the row that asks. ``last``: the last prompt token; with labels, the last one before the
            last answer, so that training decides as inference does when labels begin where answers do.
            ``turns``: with labels, the mean over the last token of every instruction. ``question``: every
            prompt token after the last visual one. Candidates of assisted decoding do not ask.
        norm: whether the layer's input norm comes before its projections.
        rope: whether queries and keys are rotated as the layer does.
        layer: ``own``: scored by layer n, dropped before it; ``previous``: scored by layer n−1 (with norm
            and rope its real attention), dropped before n; ``after``: scored by n, dropped after it.
        reduce: ``mean`` or ``max`` over heads and rows.
        budget: what shares one count: ``item`` (a video or image with all its runs), ``frame``, ``sample``
            (all of a row) or ``group`` (the static and dynamic groups of ``visual="prunevid"``; frames
            without it).
        convention: ``keep``: a ratio is the share kept. ``drop``: it is the share dropped, in [0, 1), of
            the tokens present unless ``base`` says otherwise, as the TimeViper paper writes it
            (``uni_7_0.5-attn_39_0.9`` leaves half, then a tenth of that half); its code and its guide
            mean ``keep``.
        rounding: ``int`` (towards zero; may leave none), ``int_min1`` (at least 1) or ``round``.
        base: what a ratio is of: the ``original`` tokens that entered the decoder, or the ``current`` ones.
        merge: ``"transv"`` or a :class:`~vidtok.models.transv.TransV`: pass dropped tokens to the text.
        compress: whether the layers before a drop forget its tokens too once the prompt is read: keys and
            values of all layers shrink alike, and decoded tokens see what is left everywhere (so a pass
            without a cache, in which early layers see everything, gives other logits).

    Raises:
        SpecError: showing the part of the spec that is wrong.
        ValueError: for an unknown option.

    Source: TimeViper (arXiv 2511.16595), PyramidDrop (2410.17247), FastV (2403.06764), VScan
    (2505.22654), PruneVid (2412.16117), from their formulas.

    Example:
        >>> drop = Drop("uni_7_0.50-attn_14_.25", preset="fastv")
        >>> str(drop), drop.entries, drop.scorers, drop.keep(0, 101, 101)
        ('uni_7_0.5-attn_14_0.25', (7, 14), (None, 13), 50)
    """

    spec: str
    preset: str | None = None
    query: str | None = None
    norm: bool | None = None
    rope: bool | None = None
    layer: str | None = None
    reduce: str | None = None
    budget: str | None = None
    convention: str = "keep"
    rounding: str | None = None
    base: str | None = None
    merge: str | nn.Module | None = None
    compress: bool | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"expected preset to be {_nearest(str(self.preset), PRESETS)}")
        defaults = dict(PRESETS[self.preset or "timeviper"])
        if self.preset is None:
            defaults["rounding"] = "int_min1"
        if self.convention == "drop":
            defaults["base"] = "current"
        for option in fields(self):
            choices = _CHOICES.get(option.name)
            if choices is None:
                continue
            value = getattr(self, option.name)
            if value is None:
                value = defaults[option.name]
                object.__setattr__(self, option.name, value)
            if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
                _check.fail(f"{option.name} to be one of {', '.join(map(repr, choices))}", repr(value))
        if not (self.merge is None or self.merge == "transv" or isinstance(self.merge, nn.Module)):
            _check.fail("merge to be None, 'transv' or a TransV", repr(self.merge))
        object.__setattr__(self, "_stages", _parse(self.spec, self))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order of their layers."""
        stages: tuple[Stage, ...] = self.__dict__["_stages"]
        return stages

    @property
    def entries(self) -> tuple[int, ...]:
        """Per stage, the layer before which tokens leave."""
        return tuple(s.layer + (self.layer == "after") for s in self.stages)

    @property
    def scorers(self) -> tuple[int | None, ...]:
        """Per stage, the layer whose input and projections give the scores; None for ``uni``."""
        return tuple(s.layer - (self.layer == "previous") if s.kind == "attn" else None for s in self.stages)

    def keep(self, stage: int, original: int, current: int) -> int:
        """How many tokens of a budget stay at a stage.

        Args:
            stage: its number.
            original: tokens of the budget that entered the decoder.
            current: those present before this stage.
        """
        ratio = self.stages[stage].ratio
        of = original if self.base == "original" else current
        share = ratio * of
        if self.convention == "drop":
            share = of - (share if self.rounding == "round" else int(share))
        count = round(share) if self.rounding == "round" else int(share)
        if self.rounding == "int_min1":
            count = max(1, count)
        return min(count, current)

    def validate(self, num_layers: int, layer_kinds: Sequence[str] | None = None) -> None:
        """Check the stages against a decoder.

        Args:
            num_layers: its layers.
            layer_kinds: what each is, such as ``full_attention`` or ``mamba``; None: attention everywhere.

        Raises:
            SpecError: a layer outside the model, or ``attn`` where there is no attention to ask.
        """
        for stage, entry, scorer in zip(self.stages, self.entries, self.scorers):
            if entry >= num_layers:
                last = num_layers - 1 - (self.layer == "after")
                _fail(self.spec, stage.text, f"a layer from 0 to {last} of the model's {num_layers}, got {stage.layer}")
            if scorer is None or layer_kinds is None:
                continue
            kind = layer_kinds[scorer]
            if kind not in ATTENTION:
                known = [i for i, k in enumerate(layer_kinds) if k in ATTENTION]
                shown = f" ({', '.join(map(str, known[:12]))}{', …' if len(known) > 12 else ''})" if known else ""
                _fail(self.spec, stage.text, f"attn at an attention layer{shown}, got layer {scorer} of kind {kind}")
            if kind != "full_attention" and kind != "attention" and self.layer != "own":
                _fail(self.spec, stage.text, f"a layer that sees every token, got layer {scorer} of kind {kind}")

    def __str__(self) -> str:
        return "-".join(map(str, self.stages))


def _parse(spec: str, drop: Drop) -> tuple[Stage, ...]:
    if not isinstance(spec, str):
        raise TypeError(f"expected a spec string, got {type(spec).__name__}")
    if len(spec) > _LONGEST:
        _fail(spec, spec, f"at most {_LONGEST} characters, got {len(spec)}")
    stages: list[Stage] = []
    for part in spec.split("-"):
        stage = _stage(part, spec, drop.convention)
        if drop.layer == "previous" and stage.kind == "attn" and stage.layer == 0:
            _fail(spec, part, "a layer from 1 on, because the layer before it scores")
        if stages:
            before = stages[-1]
            if stage.layer <= before.layer:
                _fail(spec, part, f"layers that ascend, got {stage.layer} after {before.layer}")
            rises = stage.ratio > before.ratio if drop.convention == "keep" else stage.ratio < before.ratio
            if drop.base == "original" and rises:
                word = "rise" if drop.convention == "keep" else "fall"
                _fail(spec, part, f"ratios that do not {word}, got {stage.ratio:g} after {before.ratio:g}")
        stages.append(stage)
    return tuple(stages)


def _stage(part: str, spec: str, convention: str) -> Stage:
    items = part.split("_")
    if len(items) != 3:
        _fail(spec, part, f"type_layer_ratio, got {len(items)} fields" if part else "type_layer_ratio, got nothing")
    kind, layer, ratio = items
    if kind not in KINDS:
        _fail(spec, part, f"a type: {_nearest(kind, KINDS)}")
    if not _LAYER.fullmatch(layer):
        _fail(spec, part, f"an integer layer of at least 0, got {layer[:60]!r}")
    if not _RATIO.fullmatch(ratio):
        _fail(spec, part, f"a ratio as a decimal number, got {ratio[:60]!r}")
    value = float(ratio)
    if convention == "keep" and not 0 < value <= 1:
        _fail(spec, part, f"a ratio in (0, 1], got {ratio}")
    if convention == "drop" and not 0 <= value < 1:
        _fail(spec, part, f"a dropped ratio in [0, 1), got {ratio}")
    assert math.isfinite(value)
    return Stage(kind, int(layer), value, part)


def resolve_drop(drop: str | Drop) -> Drop:
    """The :class:`Drop` that a spec string or an object means.

    Raises:
        SpecError: for a string that does not parse.
        TypeError: for anything else.
    """
    if isinstance(drop, Drop):
        return drop
    if isinstance(drop, str):
        return Drop(drop)
    raise TypeError(f"expected a spec such as 'uni_7_0.5' or a Drop, got {drop!r}")


def uniform(current: int, keep: int) -> list[int]:
    r"""Places of ``keep`` of ``current`` tokens, :math:`\lfloor i (current-1)/(keep-1) \rfloor`; the first for one."""
    if keep <= 1:
        return [0] * min(keep, current)
    return [i * (current - 1) // (keep - 1) for i in range(keep)]
