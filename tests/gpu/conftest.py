"""Tests on a real GPU (``pytest -m gpu``). Without one only ``test_operators.py`` can run, in the stand-ins that
``VIDTOK_GPU_TESTS=cpu`` asks for; that shows that the tests themselves are sound."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from vidtok.kernels import cuda

ON_GPU = torch.cuda.is_available()
STAND_INS = os.environ.get("VIDTOK_GPU_TESTS") == "cpu"
collect_ignore_glob = []
if not ON_GPU:
    collect_ignore_glob = ["test_[!o]*.py"] if STAND_INS else ["test_*.py"]


def backends() -> list[str]:
    """GPU backends that can serve here."""
    device = 0 if ON_GPU else None
    found = [] if cuda.obstacle(device) else ["cuda"]
    if importlib.util.find_spec("triton") and (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append("triton")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Runs the test once on each GPU backend."""
    import vidtok

    with vidtok.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
