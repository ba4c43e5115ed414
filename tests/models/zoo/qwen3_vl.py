"""Qwen3-VL."""

from functools import partial

from tests.models import tiny

NAME, MIN_VERSION, ROWS, DROP_AT = "qwen3_vl", (4, 57), tiny.ROWS, 2
MIXED = tiny.MIXED
batch, row = partial(tiny.batch, NAME), tiny.row


def make(attention: str = "sdpa", layers: int = 3, seed: int = 0) -> object:
    return tiny.make(NAME, attention, layers, seed)
