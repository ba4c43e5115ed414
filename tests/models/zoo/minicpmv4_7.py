"""MiniCPM-V 4.7: MiniCPM-V 4.6 with M-RoPE positions on a canvas."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common
from tests.models.zoo import _minicpm

NAME, MIN_VERSION, ROWS = "minicpmv4_7", (5, 23), _minicpm.ROWS
batch, row = partial(_minicpm.batch, types=True), _minicpm.row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

    text = common.rope(mrope_section=[1, 1, 2], mrope_interleaved=True, partial_rotary_factor=0.5)
    config = MiniCPMV4_7Config(
        **_minicpm.config(layers, **text), image_start_id=common.START, image_end_id=common.END,
        slice_start_id=common.VIDEO_START, slice_end_id=common.VIDEO_END, newline_id=4,
    )  # fmt: skip
    return common.build(MiniCPMV4_7ForConditionalGeneration, config, attention, seed)
