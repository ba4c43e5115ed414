"""Families of transformers with video that are not taken, and the line that stands in the way."""

from __future__ import annotations

#: (folder in transformers, reason)
UNSUPPORTED: tuple[tuple[str, str], ...] = ()
