"""Passes in which the tokens of frames merge, and those in which the frames of a video join as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vidtok.merge.clips import FILL, FrameRun, FrameStep
from vidtok.merge.options import ToMe
from vidtok.merge.run import Run, Step
from vidtok.merge.tempme import TempMe
from vidtok.plan import Plan


def begin(options: ToMe | TempMe | None, layers: int, tokens: int, frames: int) -> Run | None:
    """The run of one pass over videos of ``frames`` of ``tokens``; the last layer, of which one token is read,
    merges nothing behind its attention."""
    if options is None:
        return None
    if isinstance(options, TempMe):
        run: Run = FrameRun(options, options.levels(layers, frames, tokens, 1), frames, options.trace)
    else:
        run = Run(options, (*options.schedule.counts(layers, tokens, 1)[:-1], 0), 1, options.trace)
    run.tokens[0] = tokens
    return run


def recomputed(again: bool, layer: Callable[..., Any], *args: Any) -> Any:
    """``layer(*args)``, of which only the arguments are kept for the backward pass where ``again`` is true.

    Its step belongs to the run of this pass, so that the tokens of the second time are those of the first.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


def join(step: Step | None, x: Tensor) -> Tensor:
    """The tokens that a layer's attention gets, after the clips that join there have joined."""
    return step.join(x, None) if isinstance(step, FrameStep) else x


def each(step: Step | None) -> int:
    """Frames of a sequence."""
    return step.level.frames if isinstance(step, FrameStep) else 1


def sizes(step: Step | None, rows: int, shared: int, frames: int, prompts: int) -> Tensor | None:
    """How often each key counts, fp32 ``[rows, shared + prompts + n]``; None where all count once.

    Prompts count once, those of frames with which a clip was filled up nothing, as their tokens.
    """
    if step is None or step.size is None:
        return None
    size, filled = step.size, isinstance(step, FrameStep) and step.run.filled[step.index]
    if not step.run.options.prop_attn:
        if not filled:
            return None
        size = size.clamp(max=1.0)
    if not filled:
        return F.pad(size, (shared + prompts * each(step), 0), value=1.0)
    clips = -(-frames // each(step))
    own = size.new_ones(rows // clips, clips * each(step), prompts)
    own[:, frames:] = FILL
    return torch.cat([size.new_ones(rows, shared), own.view(rows, -1), size], 1)


def plan_of(run: Run) -> Plan | None:
    """From the tokens of all frames to those that the last layer's attention saw; None where nothing merged."""
    plan = run.plan()
    entered = run.entered[-1] if isinstance(run, FrameRun) else None
    if entered is None or plan is None:
        return entered or plan
    return plan.compose(entered, partition=True)
