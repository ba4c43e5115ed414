"""Idefics 3: each frame of a video comes as an image."""

from typing import Any

from tests.models.zoo import _common as common
from tests.models.zoo import smolvlm

NAME, MIN_VERSION, ROWS = "idefics3", (4, 57), smolvlm.ROWS
batch, row = smolvlm.batch, smolvlm.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return common.build(Idefics3ForConditionalGeneration, Idefics3Config(**smolvlm.config(layers)), attention, seed)
