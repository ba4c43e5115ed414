"""What ``vision=`` and :func:`vidtok.merge.attach_any` are told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vidtok import _check
from vidtok.merge.schedule import Schedule

METRICS = ("keys", "values", "hidden")
FORMS = ("auto", "mask", "channel")


@dataclass(frozen=True)
class ToMe:
    r"""Token merging between the attention and the MLP of every block of a vision tower.

    In block l the :math:`r_l` most similar pairs of the tokens that came out of the attention half become
    one each, :math:`x = \sum size_i x_i / \sum size_i`; the next blocks attend to it with
    :math:`softmax(q k^T scale + \log size)`.

    Args:
        r: merges of every layer; a list, one for each layer; or ``(r, inflection)``.
        ratio: share of the tokens left after the last layer, instead.
        k: tokens left after the last layer, instead.
        metric: what similarity is taken of: ``keys`` (mean over heads), ``values`` (mean over heads) or
            ``hidden`` (the tokens themselves).
        prop_attn: whether attention weighs a token by how many it stands for.
        protected: tokens that never merge: how many at the start, beside the tower's own class and register
            tokens; or bool ``[T]`` or ``[B, T]`` of the tower's sequence.
        trace: whether the plans of all layers are kept, for :meth:`vidtok.merge.Merging.trace` and
            :meth:`vidtok.merge.Merging.unmerge`.
        form: how the log of the sizes enters attention: an additive ``mask``, one or two appended
            ``channel``, or ``auto`` (the faster one for the device and the attention function).

    Raises:
        ValueError: for options outside their range.

    Source: Bolya et al., Token Merging, ICLR 2023, §3.

    Example:
        >>> ToMe(r=(8, -1)).schedule.counts(12, 197, 1)
        (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    """

    r: Any = None
    ratio: float | None = None
    k: int | None = None
    metric: str = "keys"
    prop_attn: bool = True
    protected: int | Tensor = field(default=0, compare=False)
    trace: bool = False
    form: str = "auto"

    def __post_init__(self) -> None:
        _ = self.schedule
        if self.metric not in METRICS:
            _check.fail(f"metric as one of {', '.join(METRICS)}", repr(self.metric))
        if self.form not in FORMS:
            _check.fail(f"form as one of {', '.join(FORMS)}", repr(self.form))
        count = self.protected
        if isinstance(count, Tensor):
            if count.dtype != torch.bool or count.dim() not in (1, 2):
                _check.fail("protected as an integer or bool [T] or [B, T]", count)
        elif not isinstance(count, int) or isinstance(count, bool) or count < 0:
            _check.fail("protected as an integer of at least 0 or a bool tensor", repr(count))
        for name in ("prop_attn", "trace"):
            if not isinstance(getattr(self, name), bool):
                _check.fail(f"{name} as True or False", repr(getattr(self, name)))

    @cached_property
    def schedule(self) -> Schedule:
        """Merges per layer."""
        return Schedule(self.r, self.ratio, self.k)

    def __str__(self) -> str:
        from vidtok.spec import _text

        changed = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in fields(self)
            if not isinstance(getattr(self, f.name), Tensor) and getattr(self, f.name) != f.default
        ]
        return "tome" + (":" + ",".join(changed) if changed else "")
