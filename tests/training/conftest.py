"""The tiny models of ``tests/models``, and pairs to train on."""

from __future__ import annotations

import pytest

from tests.models.conftest import models, one_thread
from tests.training.retrieval_parts import pairs_of
from vidtok.data.retrieval import TrainingPairs

__all__ = ["models", "one_thread"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingPairs:
    return pairs_of(tmp_path_factory.mktemp("pairs"))
