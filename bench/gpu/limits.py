"""What the card allows, measured on it: copy bandwidth, matmul rates, the time of an empty launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.timing import Timer

EMPTY_LAUNCHES = 64
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class GpuLimits:
    """Rates of one card.

    Args:
        tiny: buffers that a test can afford.
    """

    def __init__(self, timer: Timer, device: torch.device, tiny: bool = False) -> None:
        self.timer, self.device = timer, device
        self.l2 = 1 << 16
        if device.type == "cuda":
            self.l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
        megabytes = 1 if tiny else 2048
        self.copy_rate = self._copy(megabytes << 20)
        n = 64 if tiny else 8192
        dtypes = [torch.float32, torch.float16]
        if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0):
            dtypes.append(torch.bfloat16)
        self.flop_rates = {d: self._matmul(n if d is not torch.float32 else n // 2, d) for d in dtypes}
        self.launch = self._launch()

    def _best(self, run: Callable[[], Any], samples: int = 15) -> float:
        """Seconds of the least disturbed tenth."""
        run()
        return statistics.quantiles([self.timer.seconds(run) for _ in range(samples)], n=10)[0]

    def _copy(self, size: int) -> float:
        """Bytes read and written per second."""
        a = torch.empty(size // 4, device=self.device).normal_()
        b = torch.empty_like(a)
        return 2 * size / self._best(lambda: b.copy_(a))

    def _matmul(self, n: int, dtype: torch.dtype) -> float:
        """FLOPs per second on random values (zeros run faster than real data); fp32 without tf32."""
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.float32).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            return 2 * n**3 / self._best(lambda: a @ b, 9)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _launch(self) -> float:
        """Seconds that a kernel of no work takes inside a graph."""
        x = torch.zeros(1, device=self.device)
        replay = self.timer.replayer(lambda _: x.add_(1), EMPTY_LAUNCHES)
        assert replay is not None
        return self._best(replay, 25) / EMPTY_LAUNCHES

    def seconds(self, work: tuple[tuple[float, float], ...], dtype: torch.dtype, launches: int) -> float:
        """The largest of bytes over bandwidth, FLOPs over the dtype's rate, and launches over their rate."""
        passes = sum(max(b / self.copy_rate, f / self.flop_rates[dtype]) for b, f in work)
        return max(passes, launches * self.launch)

    def kind(self, work: tuple[tuple[float, float], ...], dtype: torch.dtype, launches: int) -> str:
        """Which of the three it is."""
        moved = sum(b for b, _ in work) / self.copy_rate
        done = sum(f for _, f in work) / self.flop_rates[dtype]
        return max((moved, "bytes"), (done, "flops"), (launches * self.launch, "launches"))[1]
