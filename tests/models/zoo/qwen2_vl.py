"""Qwen2-VL."""

from functools import partial

from tests.models import tiny

NAME, MIN_VERSION, ROWS = "qwen2_vl", (4, 57), tiny.ROWS
MIXED = tiny.MIXED
batch, row = partial(tiny.batch, NAME), tiny.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    return tiny.make(NAME, attention, layers, seed)
