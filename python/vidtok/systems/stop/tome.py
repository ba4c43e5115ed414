"""Token merging in the retrieval model's vision tower."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vidtok import _check
from vidtok.merge.options import ToMe
from vidtok.merge.tempme import TempMe
from vidtok.systems.stop.config import Config, Sizes

if TYPE_CHECKING:
    from vidtok.systems.stop.model import CLIP4Clip


def left(options: ToMe | TempMe, sizes: Sizes, frames: int = 12) -> list[int]:
    """Tokens of a frame, or of what frames have joined to, after each layer; the last one merges nothing.

    Example:
        >>> left(ToMe(r=8), Sizes())
        [42, 34, 26, 18, 10, 6, 4, 3, 2, 2, 2, 2]
    """
    tokens, out = sizes.grid**2 + 1, []
    if isinstance(options, TempMe):
        levels = options.levels(sizes.vision_layers, frames, tokens, 1)
        return [*(level.tokens_out for level in levels[:-1]), levels[-1].attended]
    for count in (*options.schedule.counts(sizes.vision_layers, tokens, 1)[:-1], 0):
        tokens -= count
        out.append(tokens)
    return out


def _numbers(text: Any, name: str) -> list[int]:
    parts = text.split("-") if isinstance(text, str) else list(text)
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError):
        _check.fail(f"{name} as integers with - between them", repr(text))


def options_of(config: Config, sizes: Sizes) -> ToMe | TempMe | None:
    """What the settings merge, None for nothing; warns where a layer has too few tokens for ``tome_r``."""
    r = 0 if config.tome_r is None else config.tome_r
    common: dict[str, Any] = {
        "metric": config.tome_metric,
        "prop_attn": config.tome_prop_attn,
        "trace": config.tome_trace_source,
    }
    options: ToMe | TempMe = ToMe(r=r, **common)
    if r == 0:
        if config.tome_frame_merging:
            warnings.warn("tome_frame_merging does nothing with tome_r=0, which takes all merging out", stacklevel=4)
        return None
    tokens, layers = sizes.grid**2 + 1, sizes.vision_layers
    if config.tome_frame_merging:
        shares = _numbers(config.tome_merge_proportions, "tome_merge_proportions")
        if len(shares) != 2:
            _check.fail("tome_merge_proportions with two numbers", repr(config.tome_merge_proportions))
        layer_list = _numbers(config.tome_merge_layers, "tome_merge_layers")
        counts = _numbers(config.tome_merge_frame_nums, "tome_merge_frame_nums")
        options = TempMe(
            r=r,
            merge_layers=tuple(layer_list),
            merge_frames=tuple(counts),
            cross=shares[0] / 100,
            intra=shares[1] / 100,
            **common,
        )
    wanted = options.schedule.wanted(layers, tokens)
    if isinstance(options, ToMe):
        if not any(wanted):
            return None
        wanted = wanted[:-1]
    done = ToMe(r=[*wanted, *[0] * (layers - len(wanted))]).schedule.counts(layers, tokens, 1)
    short = next((layer for layer, want in enumerate(wanted) if done[layer] < want), None)
    if short is not None:
        after = ", ".join(map(str, left(options, sizes, config.max_frames)))
        warnings.warn(
            f"tome_r={r} asks for more merges than the {tokens} tokens of a frame allow: from layer {short} on fewer "
            f"merge, and the layers leave {after}",
            stacklevel=4,
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
