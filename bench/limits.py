"""What the machine allows: bytes over the best copy bandwidth, FLOPs over the best rate of arithmetic.

Both are measured again beside every sample of an operator, so that a change of the clock or a noisy
neighbour hits the operator and its limit alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import clock
from vidtok.kernels import select

SLICE = 24 << 20


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB when the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def cold_bytes() -> int:
    """How much has to be touched before anything counts as cold again."""
    return 4 * last_level_cache() + (8 << 20)


def _seconds(run: Callable[[], Any]) -> float:
    start = clock.now()
    run()
    return (clock.now() - start) * 1e-9


class Limits:
    """Copy and arithmetic rates at a number of threads; ``copy`` and ``flops`` take one sample each."""

    def __init__(self, threads: int, dtype: torch.dtype = torch.float32, samples: int = 25) -> None:
        self.threads = threads
        size = max(cold_bytes(), 4 * SLICE) // SLICE * SLICE
        self._samples = samples
        self._source = torch.zeros(size // 4).fill_(1.0)
        self._target = torch.zeros(size // 4)
        self._at = 0
        self._kernels = getattr(select, "_C", None)
        if self._kernels is not None and not hasattr(self._kernels, "peak_flops"):
            self._kernels = None
        self.copy_ways = {"torch.copy_": self._torch_copy}
        self.flop_ways: dict[str, Callable[[], float]] = self._matmuls(dtype)
        if self._kernels is not None:
            self.copy_ways["vidtok stream_copy"] = self._stream_copy
            if dtype == torch.float32:
                self.flop_ways["vidtok FMA loop"] = self._fma_loop
        self.copy_rates = {k: self._best(lambda way=way: self._copy_rate(way)) for k, way in self.copy_ways.items()}
        self.flop_rates = {k: self._best(way) for k, way in self.flop_ways.items()}
        # Not part of the limit: what a pass that writes nothing can hope for.
        self.read_rate = self._best(self._read_rate)
        self.best_copy = max(self.copy_rates, key=self.copy_rates.__getitem__)
        self.best_flops = max(self.flop_rates, key=self.flop_rates.__getitem__)

    def _best(self, way: Callable[[], float]) -> float:
        """The rate of the least disturbed tenth."""
        way()
        return statistics.quantiles([way() for _ in range(self._samples)], n=10)[-1]

    def _slices(self) -> tuple[Tensor, Tensor]:
        step = SLICE // 4
        self._at = (self._at + step) % self._source.numel()
        return self._source[self._at : self._at + step], self._target[self._at : self._at + step]

    def _torch_copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def _stream_copy(self, source: Tensor, target: Tensor) -> None:
        self._kernels.stream_copy(source.data_ptr(), target.data_ptr(), SLICE, self.threads)

    def _copy_rate(self, way: Callable[[Tensor, Tensor], None]) -> float:
        source, target = self._slices()
        return 2 * SLICE / _seconds(lambda: way(source, target))

    def _read_rate(self) -> float:
        source, _ = self._slices()
        return SLICE / _seconds(source.sum)

    def _matmuls(self, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
        n = 768
        a, b, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
        ways = {"torch.mm": lambda: 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out))}
        linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if linear is not None and torch.backends.mkldnn.is_available():
            ways["oneDNN"] = lambda: 2 * n**3 / _seconds(lambda: linear(a, b, None, "none", [], ""))
        return ways

    def _fma_loop(self) -> float:
        start = clock.now()
        flops, _ = self._kernels.peak_flops(400_000, self.threads)
        return flops / ((clock.now() - start) * 1e-9)

    def taken_elsewhere(self, seconds: float = 1.0) -> float:
        """Share of the threads' time that other programs took, over so many seconds of arithmetic on every thread."""
        wall, own = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            self.flops()
        return max(0.0, 1 - (time.process_time() - own) / (time.perf_counter() - wall) / self.threads)

    def copy(self) -> float:
        """Bytes read and written per second, now."""
        return self._copy_rate(self.copy_ways[self.best_copy])

    def flops(self) -> float:
        """FLOPs per second, now."""
        return self.flop_ways[self.best_flops]()

    def seconds(self, work: tuple[tuple[float, float], ...], copy: float, flops: float) -> float:
        """Least time for passes of (bytes, FLOPs), each bound by the larger of its two shares."""
        return sum(max(b / copy, f / flops) for b, f in work)

    def kind(self, work: tuple[tuple[float, float], ...]) -> str:
        """``bytes`` or ``flops``: what most of the least time is."""
        copy, flops = self.copy_rates[self.best_copy], self.flop_rates[self.best_flops]
        by_bytes = sum(b / copy for b, f in work if b / copy >= f / flops)
        return "bytes" if 2 * by_bytes >= self.seconds(work, copy, flops) else "flops"
