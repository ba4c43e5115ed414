"""The tiny models of ``tests/models``."""

from __future__ import annotations

from tests.models.conftest import models, one_thread

__all__ = ["models", "one_thread"]
