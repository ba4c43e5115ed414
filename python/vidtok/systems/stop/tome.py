"""Token merging in the retrieval model's vision tower."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vidtok import _check
from vidtok.merge.options import ToMe
from vidtok.systems.stop.config import Sizes

if TYPE_CHECKING:
    from vidtok.systems.stop.model import CLIP4Clip


def left(options: ToMe, sizes: Sizes) -> list[int]:
    """Tokens of a frame, its class token counted, after each layer; the last one merges nothing.

    Example:
        >>> left(ToMe(r=8), Sizes())
        [42, 34, 26, 18, 10, 6, 4, 3, 2, 2, 2, 2]
    """
    tokens = sizes.grid**2 + 1
    out = []
    for count in (*options.schedule.counts(sizes.vision_layers, tokens, 1)[:-1], 0):
        tokens -= count
        out.append(tokens)
    return out


def options_of(tome_r: Any, trace_source: bool, prop_attn: bool, metric: str, sizes: Sizes) -> ToMe | None:
    """The options of these settings, None where nothing merges; warns where a layer has too few tokens for ``r``."""
    if tome_r is None:
        tome_r = 0
    options = ToMe(r=tome_r, metric=metric, prop_attn=prop_attn, trace=trace_source)
    tokens = sizes.grid**2 + 1
    wanted = options.schedule.wanted(sizes.vision_layers, tokens)
    if not any(wanted):
        return None
    done = options.schedule.counts(sizes.vision_layers, tokens, 1)
    short = [layer for layer, (want, got) in enumerate(zip(wanted[:-1], done)) if got < want]
    if short:
        after = ", ".join(map(str, left(options, sizes)))
        warnings.warn(
            f"tome_r={tome_r} asks for more merges than the {tokens} tokens of a frame allow: from layer {short[0]} "
            f"on fewer merge, and the layers leave {after}",
            stacklevel=3,
        )
    return options


def apply_tome_patch(
    model: CLIP4Clip, tome_r: Any = None, trace_source: bool = False, prop_attn: bool = True
) -> CLIP4Clip:
    """Merge tokens in the vision tower of ``model`` from now on.

    Args:
        model: a :class:`vidtok.systems.stop.CLIP4Clip`, or a wrapper whose ``module`` is one.
        tome_r: merges per layer and frame; None keeps the model's own, 0 takes the merging out.
        trace_source: whether ``model.source_map()`` can tell where every patch went.
        prop_attn: whether keys weigh by how many tokens they stand for.

    Returns:
        ``model``.
    """
    inner = getattr(model, "module", model)
    if not hasattr(inner, "set_tome"):
        _check.fail("a vidtok.systems.stop.CLIP4Clip", type(model).__name__, TypeError)
    inner.set_tome(inner.config.tome_r if tome_r is None else tome_r, trace_source, prop_attn)
    return model
