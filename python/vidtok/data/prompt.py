"""The prompt of videos and a question, as token ids."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidtok.data.patchify import Patches, PatchSpec
from vidtok.data.video import Video

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def build(
    model: Any, tokenizer: Any, clips: Sequence[tuple[Video, Patches]], spec: PatchSpec, question: str
) -> dict[str, Any]:
    """Inputs of ``generate`` for a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, batch 1.

    The text is the family's chat template written out, videos before the question; placeholders follow the
    patch grids, one run for a video, or one per moment after its time in seconds with Qwen3-VL.

    Args:
        model: the model, for its config and vocabulary.
        tokenizer: its tokenizer.
        clips: sampled frames and patches of each video.
        spec: the model's patch rules.
        question: plain text.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[1, L]``, ``pixel_values_videos`` fp32, ``video_grid_thw``
        int64 ``[V, 3]``, and what else the model's forward takes.

    Raises:
        ValueError: when the question contains the model's own placeholders, or the tokenizer is another model's.

    Example:
        >>> inputs = build(model, tokenizer, [(video, patches)], spec, "What happens?")  # doctest: +SKIP
    """
    config, merge = model.config, spec.merge_size
    start, end, pad = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = encode(question)
    reserved = {start, end, pad, config.image_token_id}
    if reserved & set(asked):
        raise ValueError("expected a question in plain text, got one with the model's own video placeholders")
    newer = config.model_type.startswith("qwen3_vl")
    ids = encode(("" if newer else _SYSTEM) + "<|im_start|>user\n")
    for video, patches in clips:
        t, h, w = patches.grid_thw
        per_moment = (h // merge) * (w // merge)
        if newer:
            for moment in _moments(video, spec.temporal_patch_size):
                ids += [*encode(f"<{moment:.1f} seconds>"), start, *[pad] * per_moment, end]
        else:
            ids += [start, *[pad] * (t * per_moment), end]
    ids += [*asked, *encode("<|im_end|>\n<|im_start|>assistant\n")]
    vocabulary = model.get_input_embeddings().num_embeddings
    if max(ids) >= vocabulary:
        raise ValueError(f"expected a tokenizer of at most {vocabulary} tokens, got one that made token {max(ids)}")
    input_ids = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if clips:
        inputs["pixel_values_videos"] = torch.cat([p.pixel_values_videos for _, p in clips])
        inputs["video_grid_thw"] = torch.tensor([p.grid_thw for _, p in clips])
    accepted = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = (input_ids == pad).int() * 2
    if clips and "second_per_grid_ts" in accepted:
        inputs["second_per_grid_ts"] = torch.tensor([spec.temporal_patch_size / v.sampled_fps for v, _ in clips])
    return inputs


def _moments(video: Video, step: int) -> list[float]:
    """Seconds in the middle of each group of ``step`` frames, the last one repeated to a whole group."""
    stamps = [*video.timestamps, *[video.timestamps[-1]] * (-len(video.timestamps) % step)]
    return [(stamps[i] + stamps[i + step - 1]) / 2 for i in range(0, len(stamps), step)]


def to_device(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs where the model is, pixels in its dtype."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "pixel_values_videos" in moved:
        moved["pixel_values_videos"] = moved["pixel_values_videos"].to(dtype)
    return moved
