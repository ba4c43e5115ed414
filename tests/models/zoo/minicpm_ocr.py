"""MiniCPM-OCR: four times as many tokens of a frame as MiniCPM-V."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common
from tests.models.zoo import _minicpm

NAME, MIN_VERSION = "minicpm_ocr", (5, 23)
ROWS = [[("video", 3, 56)], [("video", 2, 56), ("video", 3, 56)], [("video", 2, 84)]]
batch, row = partial(_minicpm.batch, merge=2), _minicpm.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration

    config = MiniCPMOcrConfig(**{**_minicpm.config(layers), "tie_word_embeddings": False})
    return common.build(MiniCPMOcrForConditionalGeneration, config, attention, seed)
