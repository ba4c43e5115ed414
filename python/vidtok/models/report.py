"""What an attached model did in its last prefill, what it saved, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidtok.plan import Plan

if TYPE_CHECKING:
    from vidtok.models.cost import LayerCost
    from vidtok.models.tokens import Tokens
    from vidtok.models.vision import Tower

STAGES = ("vision", "decide", "move", "select", "prefill", "decode")


@dataclass(frozen=True)
class Sample:
    """One video or image of the batch.

    Args:
        row: its row in the batch.
        kind: ``"video"`` or ``"image"``.
        tokens_in: visual tokens before the reduction.
        tokens_out: visual tokens that entered the language model.
        grid_thw: its token grid (frames, rows, columns).
        plan: over its own tokens; ``plan.trace([grid_thw])`` names the cells of each output.
        stages: for each layer before which tokens were dropped, in order: the plan from its own tokens to those
            that the layer and those after it see, the reduction at the input included.
    """

    row: int
    kind: str
    tokens_in: int
    tokens_out: int
    grid_thw: tuple[int, int, int]
    plan: Plan
    stages: tuple[tuple[int, Plan], ...] = ()

    def at(self, layer: int) -> Plan:
        """The plan from its own tokens to those that ``layer`` (0-based) sees."""
        return next((plan for first, plan in reversed(self.stages) if first <= layer), self.plan)


@dataclass(frozen=True)
class Layer:
    """One decoder layer in the prefill; :mod:`vidtok.models.cost` states the formulas.

    Args:
        index: 0-based.
        kind: ``full_attention``, ``sliding_attention``, ``linear_attention``, ...
        tokens: tokens of all rows that it computed, padding not counted.
        kv_length: columns per row that its cache holds after the prefill, padding included; 0 without attention.
        kv_bytes: bytes of its keys and values, all rows.
        flops: operations of its forward pass.
        kv_bytes_whole: ``kv_bytes`` without reduction.
        flops_whole: ``flops`` without reduction.
    """

    index: int
    kind: str
    tokens: int
    kv_length: int
    kv_bytes: int
    flops: int
    kv_bytes_whole: int
    flops_whole: int


@dataclass(frozen=True)
class Report:
    """The last prefill of an attached model.

    Args:
        samples: one per reduced video or image, in the order of the rows.
        tokens_in: tokens of each row before the reduction, padding not counted.
        tokens_out: tokens of each row that entered the language model.
        times: seconds per stage: ``vision`` (tower), ``decide`` and ``move`` (at the input), ``select`` (inside the
            decoder, a part of ``prefill``), ``prefill`` and ``decode`` (language model); a stage that did not run
            is missing.
        decode_steps: forward passes counted in ``times["decode"]``.
        layers: one per decoder layer; empty for a language model without a list of layers.
        vision: one per vision tower in which tokens merge; see :class:`vidtok.models.vision.Tower`.
    """

    samples: list[Sample] = field(default_factory=list)
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0
    layers: list[Layer] = field(default_factory=list)
    vision: tuple[Tower, ...] = ()

    @property
    def flops(self) -> int:
        """Operations of the prefill in all decoder layers."""
        return sum(layer.flops for layer in self.layers)

    @property
    def flops_whole(self) -> int:
        """The same without reduction."""
        return sum(layer.flops_whole for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values after the prefill."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def kv_bytes_saved(self) -> int:
        """Bytes of keys and values that the reduction saved."""
        return sum(layer.kv_bytes_whole for layer in self.layers) - self.kv_bytes

    def __str__(self) -> str:
        lines = [f"vision tower {tower}" for tower in self.vision]
        lines += [
            f"row {s.row}: {s.kind} {s.grid_thw[0]}×{s.grid_thw[1]}×{s.grid_thw[2]}, "
            f"{s.tokens_in} -> {s.tokens_out} visual tokens"
            for s in self.samples
        ]
        lines += [
            f"row {s.row}: {s.kind}, {plan.num_out} visual tokens from layer {layer} on"
            for s in self.samples
            for layer, plan in s.stages
        ]
        lines += [f"row {i}: {a} -> {b} tokens in all" for i, (a, b) in enumerate(zip(self.tokens_in, self.tokens_out))]
        for (kind, tokens, length), group in groupby(self.layers, lambda x: (x.kind, x.tokens, x.kv_length)):
            same = list(group)
            span = f"layer {same[0].index}" if len(same) == 1 else f"layers {same[0].index}-{same[-1].index}"
            cache = f", KV length {length} ({_bytes(sum(x.kv_bytes for x in same))})" if length else ""
            lines.append(f"{span}: {kind}, {tokens} tokens{cache}, {_flops(sum(x.flops for x in same))}")
        if self.layers:
            share = self.flops / self.flops_whole if self.flops_whole else 1.0
            lines.append(
                f"decoder: {_flops(self.flops)} of {_flops(self.flops_whole)} ({share:.0%}), "
                f"KV cache {_bytes(self.kv_bytes)}, {_bytes(self.kv_bytes_saved)} saved"
            )
        lines += [f"{name}: {1e3 * seconds:.1f} ms" for name, seconds in self.times.items()]
        return "\n".join(lines)


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:.4g} {unit}"
        value /= base
    return f"{value:.4g} {units[-1]}"


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))


def _flops(value: float) -> str:
    return _scaled(value, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"))


class Span:
    """Time between two points: wall time on CPU, events on CUDA, which are read only when asked."""

    __slots__ = ("begin", "cuda", "end")

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.end: Any = None
        self.begin: Any = self._now()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Span:
        """Mark the end."""
        self.end = self._now()
        return self

    def seconds(self) -> float:
        """Length in seconds; waits for the device."""
        if self.end is None:
            return 0.0
        if not self.cuda:
            return self.end - self.begin
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


@dataclass(frozen=True)
class Unit:
    """One video or image as it lies in the batch."""

    kind: str
    row: int
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """One drop inside the decoder, as the decoder hook leaves it to the report.

    Args:
        layer: 0-based layer at whose entry it happened.
        kind: ``uni``, ``attn`` or another name.
        rows: from the rows that reached the layer to those that go on (``Plan.lift(..., dense=True)``).
        tokens: the visual tokens among the columns that reached the layer.
        everywhere: whether the caches of the layers before it were shortened too.
    """

    layer: int
    kind: str
    rows: Plan
    tokens: Tokens
    everywhere: bool = False


class Record:
    """Raw material of a report, gathered without reading the device."""

    def __init__(self, units: list[Unit], plan: Plan | None, shape: tuple[int, int], real: Tensor | None) -> None:
        self.units, self.plan, self.shape, self.real = units, plan, shape, real
        self.rows: Plan | None = None
        self.spans: dict[str, list[Span]] = {}
        #: What the decoder hook did, in order.
        self.stages: Sequence[Stage] | None = None
        #: Columns that the cache of each layer held before the prefill, and what it would hold unreduced.
        self.past: Sequence[int] = ()
        self.past_whole = 0

    def add(self, stage: str, span: Span | None) -> None:
        """Count a span under a stage."""
        if span is not None:
            self.spans.setdefault(stage, []).append(span)

    def before(self, cache: Any, whole: int) -> None:
        """Note what the cache held before the prefill; it would hold ``whole`` columns without reduction."""
        self.past_whole = whole
        if whole and cache is not None:
            held = [getattr(layer, "keys", None) is not None for layer in cache.layers]
            self.past = [int(layer.get_seq_length()) if has else 0 for layer, has in zip(cache.layers, held)]

    def report(self, costs: Sequence[LayerCost] = ()) -> Report:
        """Read everything on the host."""
        batch, length = self.shape
        tokens_in = [length] * batch if self.real is None else self.real.sum(1).tolist()
        tokens_out = tokens_in if self.rows is None else _real(self.rows, batch)
        times: dict[str, float] = {}
        for stage in STAGES:
            if stage in self.spans:
                times[stage] = sum(span.seconds() for span in self.spans[stage])
        return Report(
            self._samples(),
            tokens_in,
            tokens_out,
            times,
            len(self.spans.get("decode", ())),
            self._layers(costs, tokens_in, tokens_out),
        )

    # ------------------------------------------------------------------ layers
    def _layers(self, costs: Sequence[LayerCost], tokens_in: list[int], tokens_out: list[int]) -> list[Layer]:
        batch, length = self.shape
        width = length if self.rows is None else self.rows.num_out // max(batch, 1)
        stages = list(self.stages or ())
        seen = [(0, tokens_out, width)]
        seen += [(s.layer, _real(s.rows, batch), s.rows.num_out // max(batch, 1)) for s in stages]
        layers = []
        for i, cost in enumerate(costs):
            _, tokens, columns = next(x for x in reversed(seen) if x[0] <= i)
            held = min([columns, *(w for s, (_, _, w) in zip(stages, seen[1:]) if s.everywhere and s.layer > i)])
            past = self.past[i] if i < len(self.past) else 0
            layers.append(
                Layer(
                    i,
                    cost.kind,
                    sum(tokens),
                    cost.kv_columns(past + held),
                    batch * cost.kv_bytes(past + held),
                    sum(cost.flops(n, past) for n in tokens),
                    batch * cost.kv_bytes(self.past_whole + length),
                    sum(cost.flops(n, self.past_whole) for n in tokens_in),
                )
            )
        return layers

    # ------------------------------------------------------------------ samples
    def _samples(self) -> list[Sample]:
        stages = [Stage(s.layer, s.kind, s.rows.to("cpu"), s.tokens, s.everywhere) for s in self.stages or ()]
        units = stages[0].tokens.units if stages else self.units
        plans = self._plans()
        samples = []
        for i, unit in enumerate(units):
            plan = plans.get(id(unit))
            if plan is None:  # the method at the input left it whole, or there is none
                plan = Plan.identity([int((stages[0].tokens.unit == i).sum())])
            combined, steps = plan, []
            for stage in stages:
                combined = combined.compose(_unit_plan(stage, i))
                steps.append((stage.layer, combined))
            samples.append(Sample(unit.row, unit.kind, plan.num_in, plan.num_out, unit.grid_thw, plan, tuple(steps)))
        return samples

    def _plans(self) -> dict[int, Plan]:
        """The plan at the input of each unit that the method acted on, by the unit's identity."""
        if self.plan is None:
            return {}
        plan = self.plan.to("cpu")
        cu_in, cu_out = plan.cu_seqlens_in.tolist(), plan.cu_seqlens_out.tolist()
        return {
            id(unit): _sequence(plan, cu_in[i], cu_in[i + 1], cu_out[i], cu_out[i + 1])
            for i, unit in enumerate(self.units)
        }


def _real(rows: Plan, batch: int) -> list[int]:
    """Tokens of each row without padding."""
    return rows.valid().view(batch, -1).sum(1).tolist()


def _unit_plan(stage: Stage, index: int) -> Plan:
    """What a drop did to the tokens of one unit, counted from its own first one."""
    mine = stage.tokens.unit.cpu().reshape(-1) == index
    rank = mine.cumsum(0) - 1
    anchor = stage.rows.anchor.long()
    at = (anchor >= 0) & mine[anchor.clamp(min=0)]
    count, kept = int(mine.sum()), int(at.sum())
    cu = [torch.tensor([0, n], dtype=torch.int32) for n in (count, kept)]
    if stage.rows.is_gather:
        return Plan.gather(rank[anchor[at]], cu[0], cu[1], count, length_in=count, length_out=kept)
    counts = stage.rows.offset.diff().long()
    taken = torch.repeat_interleave(at, counts)
    offset = torch.zeros(kept + 1, dtype=torch.int32)
    offset[1:] = counts[at].cumsum(0)
    member = rank[stage.rows.member.long()[taken]].to(torch.int32)
    return Plan(
        cu[0], cu[1], rank[anchor[at]].to(torch.int32), member, offset, stage.rows.weight[taken], count, count, kept
    )


def _sequence(plan: Plan, in0: int, in1: int, out0: int, out1: int) -> Plan:
    """The plan of one sequence of a packed plan, counted from its own first token."""
    cu_in = torch.tensor([0, in1 - in0], dtype=torch.int32)
    cu_out = torch.tensor([0, out1 - out0], dtype=torch.int32)
    member = offset = weight = None
    if not plan.is_gather:
        bounds = plan.offset[out0 : out1 + 1]
        lo, hi = int(bounds[0]), int(bounds[-1])
        member, offset, weight = plan.member[lo:hi] - in0, bounds - lo, plan.weight[lo:hi]
    anchor = plan.anchor[out0:out1] - in0
    return Plan(cu_in, cu_out, anchor, member, offset, weight, in1 - in0, in1 - in0, out1 - out0)
