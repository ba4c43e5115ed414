"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("vidtok", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("vidtok")

torch.set_num_threads(min(2, os.cpu_count() or 1))


def usable_isas() -> list[str]:
    """Instruction sets the extension can run here; only the forced one under VIDTOK_CPU_ISA."""
    from vidtok.kernels import select

    info = select.build_info()
    if os.environ.get("VIDTOK_CPU_ISA"):
        return [info["isa"]] if "isa" in info else []
    return list(info.get("isa_usable", []))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families", choices=("all", "core"), default="all", help="video families of tests/models/zoo that are tried"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--families") == "all":
        return
    from vidtok.models import families

    core = {*families.CORE, "llava_onevision", "internvl", "qwen2", "llama"}
    others = {name for name in families.FAMILIES if name not in core}
    left = [item for item in items if any(value in others for value in _values(item))]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def _values(item: pytest.Item) -> list[str]:
    spec = getattr(item, "callspec", None)
    return [] if spec is None else [value for value in spec.params.values() if isinstance(value, str)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Parametrised here, so that a build without the extension collects no instruction set instead of failing.
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", usable_isas(), indirect=True)


@pytest.fixture
def fresh() -> Iterator[None]:
    """accelerate keeps precision and device for the whole process; tiny tensors are slower on two threads."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set this processor has."""
    from vidtok.kernels import select

    extension = select.extension()
    before = extension.build_info()["isa"]
    assert extension.force_isa(request.param)
    yield request.param
    extension.force_isa(before)
