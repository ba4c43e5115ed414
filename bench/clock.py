"""The clock of every measurement: wall time, or the calling thread's processor time.

On a machine shared with others a second thread waits for the scheduler, and wall times say little;
one thread by its processor time still compares algorithms.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}

now: Callable[[], int] = time.perf_counter_ns


def use(name: str) -> None:
    """Measure by this clock from now on."""
    global now
    now = CLOCKS[name]
