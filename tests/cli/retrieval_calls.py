"""Arguments of the retrieval commands, on a tiny set."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def common(made: dict[str, Path], output: Path) -> list[Any]:
    return [
        "--data_path", made["data"], "--features-path", made["videos"], "--output_dir", output,
        "--no-isolate", "--device", "cpu", "--frame-cache", made["root"] / "cache",
    ]  # fmt: skip


def training(made: dict[str, Path], output: Path, *more: Any) -> list[Any]:
    return [
        "train", "retrieval", *common(made, output), "--pretrained_clip_name", made["clip"],
        "--temporal_prompt", "none",
        "--max_frames", 2, "--max-words", 12, "--batch_size", 8, "--n_display", 1, "--lr", 3e-3, "--coef-lr", 1, *more,
    ]  # fmt: skip
