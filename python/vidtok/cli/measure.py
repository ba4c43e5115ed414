"""One measured answer: time per stage, peak memory, the tokens themselves."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAGES = ("vision", "decide", "move", "prefill", "decoding")


@dataclass(frozen=True)
class Measured:
    """What one run of ``generate`` did.

    Args:
        times: seconds per stage of :data:`STAGES`.
        first_token: seconds to the first token, all stages before decoding.
        total: seconds of the whole call.
        peak_bytes: highest memory in use during it (resident on CPU, allocated on a GPU).
        extra_bytes: how far that lies above the level before it.
        new_tokens: generated ids.
        report: the attachment's report, None without one.
    """

    times: dict[str, float]
    first_token: float
    total: float
    peak_bytes: int
    extra_bytes: int
    new_tokens: list[int] = field(repr=False)
    report: Any = field(default=None, repr=False)

    @property
    def per_token(self) -> float:
        """Seconds per decoded token after the first, 0 when there is none."""
        count = len(self.new_tokens) - 1
        return self.times["decoding"] / count if count > 0 else 0.0


class _Clock:
    """A ``generate`` streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def _resident(key: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


class PeakMemory:
    """Highest memory in use between :meth:`start` and :meth:`stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Begin; memory that nothing uses goes back to the system first."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):
                # 5 resets the high-water mark of the resident set.
                Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS") or 0

    def stop(self) -> tuple[int, int]:
        """(peak, peak above the level at the start) in bytes."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _resident("VmHWM") or _process_peak()
        return peak, max(0, peak - self._before)


def _process_peak() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def vision_tower(model: Any) -> Any:
    """The module that turns pixels into visual tokens."""
    base = getattr(model, "model", model)
    return getattr(base, "visual", None) or getattr(model, "visual")  # noqa: B009


@contextmanager
def _timed(module: Any, device: torch.device, spans: list[float]) -> Iterator[None]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: begin.append(now())),
        module.register_forward_hook(lambda *_: spans.append(now() - begin.pop())),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def answer(model: Any, inputs: dict[str, Any], *, max_new_tokens: int, handle: Any = None) -> Measured:
    """Generate greedily and measure; ``handle`` is the attachment in place, if any."""
    device = inputs["input_ids"].device
    clock, memory = _Clock(), PeakMemory(device)
    spans: list[float] = []
    memory.start()
    with torch.no_grad(), _timed(vision_tower(model), device, spans):
        begin = time.perf_counter()
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=clock,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        total = time.perf_counter() - begin
    peak, extra = memory.stop()
    # The prompt comes first through the streamer, then one token at a time.
    first = clock.stamps[1] - begin if len(clock.stamps) > 1 else total
    report = handle.report() if handle is not None else None
    known = report.times if report is not None else {}
    times = {"vision": sum(spans), "decide": known.get("decide", 0.0), "move": known.get("move", 0.0)}
    times["prefill"] = max(0.0, first - sum(times.values()))
    times["decoding"] = max(0.0, total - first)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    return Measured(times, first, total, peak, extra, new, report)
