"""Models shared by the tests of the hook points."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny


@pytest.fixture(scope="session")
def models():
    """Tiny models by kind and attention, made once; tests leave them as they were."""
    made = {}

    def get(kind, attention="sdpa"):
        if (kind, attention) not in made:
            made[kind, attention] = tiny.make(kind, attention)
        return made[kind, attention]

    return get


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
