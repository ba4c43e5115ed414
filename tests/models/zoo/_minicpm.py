"""What the MiniCPM-V models share: frames packed into one row of patches, each between two marks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import Clip
from tests.models.zoo import _common as common
from tests.models.zoo import _frames
from tests.models.zoo._common import END, START, VIDEO

PATCH = 14
ROWS: list[list[Clip]] = [[("video", 3, 112)], [("video", 2, 112), ("video", 3, 56)], [("video", 2, 112)]]


def config(layers: int, **text: Any) -> dict[str, Any]:
    """Arguments of a config: linear attention and, in the last layer, full attention."""
    kinds = ["linear_attention"] * (layers - 1) + ["full_attention"]
    text = common.text_config(
        layers, model_type="qwen3_5_text", head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, layer_types=kinds, **text,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH, "image_size": 112,
    }  # fmt: skip
    return {"text_config": text, "vision_config": vision, "insert_layer_id": 0, **common.ids()}


def batch(
    samples: list[list[Clip]], side: str = "left", seed: int = 10, merge: int = 4, types: bool = False
) -> dict[str, Tensor]:
    """Processor output; ``merge`` patches of a side make a token."""
    rows, packed, sizes = [], [], []
    for i, clips in enumerate(samples):
        g = torch.Generator().manual_seed(seed + i)
        row = common.words(3, g)
        for j, (_, count, size) in enumerate(clips):
            per = (size // PATCH // merge) ** 2
            for frame in common.clip(i, j, count, size):
                n = size // PATCH
                packed.append(frame.view(3, n, PATCH, n, PATCH).permute(0, 2, 1, 3, 4).reshape(3, PATCH, -1))
                sizes.append([n, n])
                row += [START, *[VIDEO] * per, END]
            row += common.words(9, g)
        rows.append(row + common.words(2 * i, g))
    out = common.padded(rows, side)
    if types:
        out["mm_token_type_ids"] = (out["input_ids"] == VIDEO).int() * 2
    return {**out, "pixel_values_videos": torch.cat(packed, -1)[None], "target_sizes_videos": torch.tensor(sizes)}


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    """Row ``i`` alone."""
    out = _frames.per_frame_row(inputs, samples, i, "target_sizes_videos")
    counts = [sum(n for _, n, _ in clips) for clips in samples]
    wide = (inputs["target_sizes_videos"].prod(-1) * PATCH).tolist()
    start = sum(wide[: sum(counts[:i])])
    end = sum(wide[: sum(counts[: i + 1])])
    return {**out, "pixel_values_videos": inputs["pixel_values_videos"][..., start:end]}
