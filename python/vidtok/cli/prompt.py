"""The prompt of one video and one question, as token ids."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vidtok.cli.errors import InputError
from vidtok.data import Patches, PatchSpec, Video

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def build(model: Any, tokenizer: Any, video: Video, patches: Patches, spec: PatchSpec, question: str) -> dict[str, Any]:
    """Inputs of ``generate`` for a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, batch 1.

    The text is the family's chat template written out; placeholders follow the patch grid, one run for the
    video, or one per moment after its time in seconds with Qwen3-VL.

    Raises:
        InputError: when the question contains the model's own placeholders, or the tokenizer is another model's.
    """
    config, merge = model.config, spec.merge_size
    t, h, w = patches.grid_thw
    per_moment = (h // merge) * (w // merge)
    start, end, pad = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = encode(question)
    reserved = {start, end, pad, config.image_token_id}
    if reserved & set(asked):
        raise InputError("expected a question in plain text, got one with the model's own video placeholders")
    newer = config.model_type.startswith("qwen3_vl")
    if newer:
        clip: list[int] = []
        for moment in _moments(video, spec.temporal_patch_size):
            clip += [*encode(f"<{moment:.1f} seconds>"), start, *[pad] * per_moment, end]
    else:
        clip = [start, *[pad] * (t * per_moment), end]
    head = encode(("" if newer else _SYSTEM) + "<|im_start|>user\n")
    ids = [*head, *clip, *asked, *encode("<|im_end|>\n<|im_start|>assistant\n")]
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise InputError(f"expected a tokenizer of at most {vocabulary} tokens, got one that made token {max(ids)}")
    input_ids = torch.tensor([ids])
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": patches.pixel_values_videos,
        "video_grid_thw": torch.tensor([patches.grid_thw]),
    }
    accepted = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = (input_ids == pad).int() * 2
    if "second_per_grid_ts" in accepted:
        inputs["second_per_grid_ts"] = torch.tensor([spec.temporal_patch_size / video.sampled_fps])
    return inputs


def _moments(video: Video, step: int) -> list[float]:
    """Seconds in the middle of each group of ``step`` frames, the last one repeated to a whole group."""
    stamps = [*video.timestamps, *[video.timestamps[-1]] * (-len(video.timestamps) % step)]
    return [(stamps[i] + stamps[i + step - 1]) / 2 for i in range(0, len(stamps), step)]


def to_device(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs where the model is, pixels in its dtype."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    moved["pixel_values_videos"] = moved["pixel_values_videos"].to(dtype)
    return moved
