"""MiniCPM-V 4.6: a hybrid language model with 1-D positions."""

from typing import Any

from tests.models.zoo import _common as common
from tests.models.zoo import _minicpm

NAME, MIN_VERSION, ROWS = "minicpmv4_6", (5, 23), _minicpm.ROWS
batch, row = _minicpm.batch, _minicpm.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    config = MiniCPMV4_6Config(**_minicpm.config(layers))
    return common.build(MiniCPMV4_6ForConditionalGeneration, config, attention, seed)
