"""What an attached model did in its last prefill, and how long each stage took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidtok.plan import Plan


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
    """

    row: int
    kind: str
    tokens_in: int
    tokens_out: int
    grid_thw: tuple[int, int, int]
    plan: Plan


@dataclass(frozen=True)
class Report:
    """The last prefill of an attached model.

    Args:
        samples: one per reduced video or image, in the order of the rows.
        tokens_in: tokens of each row before the reduction, padding not counted.
        tokens_out: tokens of each row that entered the language model.
        times: seconds per stage: ``vision`` (tower), ``decide``, ``move``, ``prefill`` and ``decode``
            (language model); a stage that did not run is missing.
        decode_steps: forward passes counted in ``times["decode"]``.
    """

    samples: list[Sample] = field(default_factory=list)
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    decode_steps: int = 0

    def __str__(self) -> str:
        lines = [
            f"row {s.row}: {s.kind} {s.grid_thw[0]}×{s.grid_thw[1]}×{s.grid_thw[2]}, "
            f"{s.tokens_in} -> {s.tokens_out} visual tokens"
            for s in self.samples
        ]
        lines += [f"row {i}: {a} -> {b} tokens in all" for i, (a, b) in enumerate(zip(self.tokens_in, self.tokens_out))]
        lines += [f"{name}: {1e3 * seconds:.1f} ms" for name, seconds in self.times.items()]
        return "\n".join(lines)


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


class Record:
    """Raw material of a report, gathered without reading the device."""

    def __init__(self, units: list[Unit], plan: Plan | None, shape: tuple[int, int], real: Tensor | None) -> None:
        self.units, self.plan, self.shape, self.real = units, plan, shape, real
        self.rows: Plan | None = None
        self.spans: dict[str, list[Span]] = {}
        #: What the decoder hook did, one entry per stage.
        self.stages: Any = None

    def add(self, stage: str, span: Span | None) -> None:
        """Count a span under a stage."""
        if span is not None:
            self.spans.setdefault(stage, []).append(span)

    def report(self) -> Report:
        """Read everything on the host."""
        batch, length = self.shape
        tokens_in = [length] * batch if self.real is None else self.real.sum(1).tolist()
        if self.rows is None:
            tokens_out = tokens_in
        else:
            tokens_out = self.rows.valid().view(batch, -1).sum(1).tolist()
        times: dict[str, float] = {}
        for stage in ("vision", "decide", "move", "prefill", "decode"):
            if stage in self.spans:
                times[stage] = sum(span.seconds() for span in self.spans[stage])
        return Report(self._samples(), tokens_in, tokens_out, times, len(self.spans.get("decode", ())))

    def _samples(self) -> list[Sample]:
        if self.plan is None:
            return []
        plan = self.plan.to("cpu")
        cu_in, cu_out = plan.cu_seqlens_in.tolist(), plan.cu_seqlens_out.tolist()
        samples = []
        for i, unit in enumerate(self.units):
            part = _sequence(plan, cu_in[i], cu_in[i + 1], cu_out[i], cu_out[i + 1])
            samples.append(Sample(unit.row, unit.kind, part.num_in, part.num_out, unit.grid_thw, part))
        return samples


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
