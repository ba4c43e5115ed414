"""Microseconds of Python per call, on tensors too small to take time themselves."""

from __future__ import annotations


def rows(shared):
    return []
