"""``pytest bench --benchmark-only``: the cases of ``python -m bench`` through pytest-benchmark.

Its figures are times of one side each; ratios, taken pair by pair, come from ``python -m bench``.
"""

from __future__ import annotations

import gc
import itertools
import timeit
from collections.abc import Callable, Iterator

import pytest
import torch

from bench import allocator, gate
from bench.case import Case, Provider
from bench.harness import rotation
from bench.suites import SUITES


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    allocator.keep_memory()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and side of the suite that the module names."""
    if "case" not in metafunc.fixturenames:
        return
    pairs = [
        pytest.param(case, provider, id=f"{case.name}-{provider.role}")
        for name in metafunc.module.SUITES
        for case in SUITES[name]()
        for provider in (case.ours, *case.others, *([case.compiled] if case.compiled else []))
    ]
    metafunc.parametrize(("case", "provider"), pairs)


@pytest.fixture
def timed(benchmark, case: Case, provider: Provider) -> Iterator[Callable[[], None]]:
    """Gate the side against the reference, then time it over rotating inputs."""

    def run() -> None:
        inputs = case.make(0)
        gate.check(case, provider, inputs, gate.expected(case, inputs))
        with torch.no_grad():
            sets = rotation(case, inputs, provider.run(inputs))
            turn = itertools.cycle(sets)
            seconds = timeit.timeit(lambda: provider.run(inputs), number=1)
            benchmark.group = str(case)
            benchmark.extra_info["bytes"] = sum(b for b, _ in case.passes())
            benchmark.extra_info["flops"] = sum(f for _, f in case.passes())
            rounds = max(3, min(50, int(0.5 / max(seconds, 1e-6))))
            benchmark.pedantic(provider.run, setup=lambda: ((next(turn),), {}), rounds=rounds, warmup_rounds=1)

    yield run
    torch._dynamo.reset()
    gc.collect()
