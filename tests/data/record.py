"""Record what the Hugging Face processors give with a real torchvision into ``processor_values.json``.

Run from the root as ``python -m tests.data.record`` where torchvision imports (on a CPU build of torch the
module ``torchvision._meta_registrations`` has to be replaced by an empty one, as done here).
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch


def main() -> None:
    """Write the file."""
    if not torch.version.cuda:
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    from tests.data.test_patchify import SHAPES, frames_of

    rows = []
    for family, processor in (("qwen2_vl", Qwen2VLVideoProcessor()), ("qwen3_vl", Qwen3VLVideoProcessor())):
        for shape in SHAPES[:4]:
            out = processor(frames_of(shape), return_tensors="pt", do_sample_frames=False)
            flat, at = out["pixel_values_videos"].flatten(), 11
            step = flat.numel() // 199
            values = [round(v, 6) for v in flat[at::step].tolist()]
            grid = out["video_grid_thw"][0].tolist()
            rows.append({"family": family, "shape": shape, "grid_thw": grid, "at": at, "step": step, "values": values})
    text = ",\n".join(json.dumps(row) for row in rows)
    (Path(__file__).parent / "processor_values.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
