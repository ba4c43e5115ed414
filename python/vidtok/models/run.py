"""One pass of a language model whose decoder drops tokens: its columns before and after every drop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidtok import ops
from vidtok.models import budgets, columns, layers
from vidtok.models.cache import Stages
from vidtok.models.drop import Drop
from vidtok.models.packed import Packed
from vidtok.models.report import Span, Stage
from vidtok.models.tokens import Tokens
from vidtok.plan import Plan


class Step:
    """The columns of a pass between two drops.

    Args:
        stage: number of the drop before it, −1 before the first.
        width: columns of this pass.
        valid: bool ``[B, width]``, False for padding; None when all are real.
        past: columns that these layers held before the pass.
        mask: bool ``[B, past + width]``; None when all are real.
        rows: from the columns of the step before; None when none left.
        total: from the columns that entered the decoder; None when they are the same.
        key: ``[B, width]``, budget of each visual token, −1 for others; None without visual tokens.
        asking: bool ``[B, width]``, the rows whose attention decides; None without ``attn``.
        text: bool ``[B, width]``, the rows that read what is dropped; None without TransV.
        packed: the samples of a packed row; None for padded rows.
        readers: what left at the drop, and what reads it, bool over the columns of the step before.
    """

    def __init__(
        self,
        stage: int,
        width: int,
        valid: Tensor | None,
        past: int,
        mask: Tensor | None,
        rows: Plan | None = None,
        total: Plan | None = None,
        key: Tensor | None = None,
        asking: Tensor | None = None,
        text: Tensor | None = None,
        packed: Packed | None = None,
    ) -> None:
        self.text, self.packed = text, packed
        self.readers: tuple[Tensor, Tensor] | None = None
        self.stage, self.width, self.valid, self.past, self.mask = stage, width, valid, past, mask
        self.rows, self.total, self.key, self.asking = rows, total, key, asking

    def number(self, run: Run) -> Tensor:
        """int64 ``[B, width]``: places of the columns in their rows or samples, counting real tokens only."""
        if self.packed is not None:
            return self.packed.number()
        return columns.consecutive(self.mask, run.batch, self.past, self.width, run.device)

    def pairs(self, run: Run, kind: str) -> Tensor | None:
        """bool ``[B, width, width]``: what sees each other both ways."""
        pairs = run.blocks.get(kind)
        if pairs is None or self.total is None:
            return pairs
        index = self.total.anchor.long().view(run.batch, self.width)
        at = (index.clamp(min=0) % run.length).to(pairs.device)
        pairs = pairs.gather(1, at[:, :, None].expand(-1, -1, pairs.shape[2]))
        pairs = pairs.gather(2, at[:, None, :].expand(-1, self.width, -1))
        real = (index >= 0).to(pairs.device)
        return pairs & real[:, :, None] & real[:, None, :]


class Run:
    """What a pass decides. It is kept for recomputation in a checkpoint, which must meet the same decisions."""

    def __init__(
        self,
        drop: Drop,
        tokens: Tokens | None,
        stages: Stages | None,
        embeds: Tensor,
        past: int,
        cache: Any,
        labels: Tensor | None,
    ) -> None:
        self.drop, self.tokens, self.stages, self.past, self.cache, self.labels = (
            drop, tokens, stages, past, cache, labels,
        )  # fmt: skip
        self.batch, self.length = embeds.shape[:2]
        self.device = embeds.device
        self.entries = drop.entries
        self.real: Tensor | None = None
        self.old: Tensor | None = None
        self.blocks: dict[str, Tensor] = {}
        self.mrope = False
        self.original: dict[int, int] = {}
        self.steps: dict[int, Step] = {}
        self.kept: dict[int, budgets.Kept] = {}
        self.memo: dict[Any, tuple[Any, Any]] = {}
        self.records: list[Stage] = [] if stages is None or tokens is not None else stages.records
        self.spans: list[Span] = []
        self.floor = 0

    def enter(
        self, key: Tensor | None, asking: Tensor | None, text: Tensor | None = None, packed: Packed | None = None
    ) -> None:
        """Begin with the columns that enter the decoder."""
        self.base = Step(-1, self.length, self.real, self.past, None, key=key, asking=asking, text=text, packed=packed)
        self.floor = 0 if self.stages is None else self.stages.floor
        if key is None:
            for s in range(len(self.entries)):
                past, old = self._held(s)
                mask = self._joined(old, self.real, past, self.length)
                self.steps[s] = Step(s, self.length, self.real, past, mask)
            return
        self.original = budgets.originals(key)
        at = (key >= 0).any(0).nonzero()
        last = int(at[-1]) if at.numel() else -1
        self.floor = self.past + last + 1

    def _held(self, stage: int) -> tuple[int, Tensor | None]:
        """Columns that the layers behind a drop hold, and which of them are real."""
        if self.stages is None:
            return self.past, self.old
        past = self.past - self.stages.dropped[stage]
        mask = self.stages.masks[stage]
        return past, None if mask is None else mask[:, :past].to(self.device)

    def _joined(self, old: Tensor | None, new: Tensor | None, past: int, width: int) -> Tensor | None:
        return columns.joined(old, new, self.batch, past, width, self.cache, self.device)

    # ------------------------------------------------------------------ steps
    def before(self, stage: int) -> Step:
        """The columns that reach a drop."""
        return self.steps[stage - 1] if stage else self.base

    def current(self, layer: int) -> Step | None:
        """The columns of a layer; None in front of all drops."""
        found = None
        for s, entry in enumerate(self.entries):
            if entry <= layer:
                found = self.steps.get(s, found)
        return found

    def held(self, stage: int) -> Tensor:
        """int64 ``[B, held + width]``: what the layers behind a drop hold, in columns of those before all drops."""
        step = self.steps[stage]
        if self.stages is None or self.stages.columns is None:
            past = torch.arange(self.past, device=self.device).expand(self.batch, -1)
        else:
            past = self.stages.columns[stage].to(self.device)
        if step.total is None:
            new = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        else:
            new = step.total.anchor.long().view(self.batch, step.width).clamp(min=0) % self.length
        return torch.cat([past, self.past + new], 1)

    def at(self, stage: int) -> Step:
        """The columns behind a drop, also one that the pass did not come to."""
        return self.steps[stage]

    def last(self) -> Step:
        """The columns that leave the decoder."""
        return self.steps[max(self.steps)] if self.steps else self.base

    def tokens_of(self, step: Step) -> Tokens:
        """The visual tokens among the columns of a step."""
        assert self.tokens is not None
        return self.tokens if step.total is None else self.tokens.after(step.total)

    @torch.no_grad()
    def leave(self, stage: int, before: Step, kept: budgets.Kept) -> Step:
        """Let tokens leave; the decision is kept for recomputation."""
        key, asking, text = before.key, before.asking, before.text
        assert key is not None
        past, old = self._held(stage)
        if not any(kept.dropped):
            mask = self._joined(old, before.valid, past, before.width)
            step = Step(
                stage, before.width, before.valid, past, mask, None, before.total, key, asking, text, before.packed
            )
            self.steps[stage] = step
            return step
        at = (key.reshape(-1) >= 0).nonzero().squeeze(1)
        index = kept.mask.reshape(-1)[at].nonzero().squeeze(1)
        edge = [torch.tensor([0, n], dtype=torch.int32, device=at.device) for n in (at.shape[0], index.shape[0])]
        plan = Plan.gather(index, edge[0], edge[1], at.shape[0])
        cu = torch.arange(self.batch + 1, dtype=torch.int32, device=at.device) * before.width
        lengths = None
        if before.valid is None:
            lengths = [before.width] * self.batch, [before.width - n for n in kept.dropped]
        rows = plan.lift(at, cu, real=before.valid, dense=True, lengths=lengths)
        width = int(rows.length_out or 0)
        valid = rows.valid().view(self.batch, width) if rows.padded else None
        (key,) = ops.position_remap(rows, key, dim=-1, fill=-1)
        if asking is not None:
            (asking,) = ops.position_remap(rows, asking, dim=-1, fill=0)
        readers = None
        if text is not None:
            readers = ~kept.mask, text
            (text,) = ops.position_remap(rows, text, dim=-1, fill=0)
        packed = None if before.packed is None else before.packed.after(rows)
        total = rows if before.total is None else before.total.compose(rows)
        mask = self._joined(old, valid, past, width)
        step = Step(stage, width, valid, past, mask, rows, total, key, asking, text, packed)
        step.readers = readers
        self.steps[stage] = step
        return step

    # ------------------------------------------------------------------ what is made once
    def once(self, key: Any, source: Any, make: Callable[[Any], Any]) -> Any:
        """``make(source)``, remembered; ``source`` is held so that its identity stays its own."""
        if any(tensor.requires_grad for tensor in layers.tensors(source)):
            # Where hooks run inside a checkpoint, recomputation has to save the same tensors again.
            return make(source)
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = (source, make(source))
        return found[1]

    def on(self, plan: Plan, device: torch.device) -> Plan:
        """A plan on the device of a layer."""
        if plan.device == device:
            return plan
        return self.once((id(plan), device), plan, lambda p: p.to(device))
