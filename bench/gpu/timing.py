"""Times on a GPU: by replays of a CUDA graph (what the kernels cost) and by eager calls (what a user waits for).

Every sample runs over input sets that together outgrow the L2 cache, so that data is cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[int], Any]


class GpuTimer:
    """Events on the current stream."""

    kind = "gpu"

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """GPU time of one call of ``run``."""
        self._begin.record()
        run()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3

    def replayer(self, run: Run, sets: int) -> Callable[[], Any] | None:
        """Replays of ``run`` on every set in turn, as one graph; None when it cannot be captured."""
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        # A capture that fails leaves torch's allocator inside it: what waits for the GPU is not tried.
        if self.syncs(lambda: run(0)):
            return None
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    for at in range(sets):
                        run(at)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            kept = []
            with torch.cuda.graph(graph):
                for at in range(sets):
                    kept.append(run(at))
        except RuntimeError:
            torch.cuda.set_stream(before)  # torch leaves the stream of a failed capture current
            torch.cuda.synchronize()
            return None

        def replay(_: Any = kept) -> None:
            graph.replay()

        return replay

    def launches(self, run: Callable[[], Any]) -> int:
        """Kernels that one call launches."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        return sum(e.count for e in seen.key_averages() if e.device_type == device and "Mem" not in e.key)

    def syncs(self, run: Callable[[], Any]) -> int:
        """Waits of the host for the GPU that one call makes."""
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in seen)


class HostTimer:
    """The same interface by the host's clock, for a run of the program without a GPU; its times say nothing."""

    kind = "host"

    def synchronize(self) -> None: ...

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def replayer(self, run: Run, sets: int) -> Callable[[], Any] | None:
        def replay() -> None:
            for at in range(sets):
                run(at)

        return replay

    def launches(self, run: Callable[[], Any]) -> int:
        run()
        return 1

    def syncs(self, run: Callable[[], Any]) -> int:
        run()
        return 0


Timer = GpuTimer | HostTimer


def timer() -> Timer:
    return GpuTimer() if torch.cuda.is_available() else HostTimer()
