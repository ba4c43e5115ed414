"""Prompts of the three families are what their models count on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vidtok
from vidtok.cli import load, measure, prompt
from vidtok.data import PatchSpec, load_video, patchify

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}


def family(kind: str) -> tuple[Any, Any, PatchSpec]:
    """A tiny model of a family, the byte-level tokenizer, and its patch rules."""
    tokenizer = load.byte_tokenizer()
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names)
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    older = transformers.__version__.startswith("4.")
    rotary = {"rope_theta": 1e4, "rope_scaling": rope} if older else {"rope_parameters": {**rope, "rope_theta": 1e4}}
    text = {**TEXT, **rotary}
    if kind == "qwen2_vl":
        from transformers import Qwen2VLConfig as Config
        from transformers import Qwen2VLForConditionalGeneration as Model

        vision: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    elif kind == "qwen3_vl":
        from transformers import Qwen3VLConfig as Config
        from transformers import Qwen3VLForConditionalGeneration as Model

        text["head_dim"] = 32
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 16}
    else:
        loaded = load.random_model(
            layers=2, width=64, heads=2, kv_heads=1, vision_layers=2, vision_width=32, vision_heads=2, seed=0,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        return loaded.model, tokenizer, loaded.spec
    torch.manual_seed(0)
    config = Config(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Model(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, tokenizer, PatchSpec.for_model(config)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_answers_reduced_and_unreduced(clip: Path, kind: str) -> None:
    model, tokenizer, spec = family(kind)
    spec = PatchSpec(**{**spec.__dict__, "min_pixels": 4096, "max_pixels": 65536})
    video = load_video(clip, count=6, size=spec.size)
    patches = patchify(video.frames, spec, resize=False)
    inputs = prompt.build(model, tokenizer, video, patches, spec, "What?")
    count = patches.pixel_values_videos.shape[0] // 4
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == count
    plain = measure.answer(model, inputs, max_new_tokens=3)
    with vidtok.attach(model, visual="uniform:ratio=0.5") as handle:
        reduced = measure.answer(model, inputs, max_new_tokens=3, handle=handle)
    assert len(plain.new_tokens) == len(reduced.new_tokens) == 3 and plain.report is None
    assert reduced.report.samples[0].tokens_out == count // 2
    for run in (plain, reduced):
        assert all(v >= 0 for v in run.times.values()) and sum(run.times.values()) == pytest.approx(run.total)
        assert run.times["vision"] > 0 and run.times["prefill"] > 0 and run.peak_bytes > 0 and run.per_token > 0
    assert plain.times["decide"] == plain.times["move"] == 0 and reduced.times["decide"] > 0


def test_times_stand_before_each_moment_of_qwen3(clip: Path) -> None:
    model, tokenizer, spec = family("qwen3_vl")
    video = load_video(clip, count=5, size=(64, 96))
    patches = patchify(video.frames, spec, resize=False)
    ids = prompt.build(model, tokenizer, video, patches, spec, "What?")["input_ids"][0]
    run = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    stamps = video.timestamps
    middles = [(stamps[0] + stamps[1]) / 2, (stamps[2] + stamps[3]) / 2, stamps[4]]
    expected = "".join(f"<{m:.1f} seconds>{run}" for m in middles)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{expected}What?<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_of_another_model(clip: Path) -> None:
    model, _, spec = family("qwen2_5_vl")
    video = load_video(clip, count=2, size=(56, 84))
    patches = patchify(video.frames, spec, resize=False)

    def large(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [5000]}

    with pytest.raises(ValueError, match="tokenizer of at most 320 tokens, got one that made token 5000"):
        prompt.build(model, large, video, patches, spec, "What?")
