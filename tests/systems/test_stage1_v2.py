"""The usage of the drop-in names, on a tiny checkpoint saved to disk and a real video, and the script for it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vidtok
from tests.models import tiny
from vidtok.data import load_video, patchify
from vidtok.systems import stage1 as stage1_module
from vidtok.systems.prunevid import Qwen25VLPruneVid

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "test_stage1_v2.py"
VIDEO = str(tiny.video_path())
PASSED = "✅ TEST PASSED - Stage 1 V2 works correctly!"


def script():
    spec = importlib.util.spec_from_file_location("stage1_v2_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return script().tiny_checkpoint(str(tmp_path_factory.mktemp("model") / "tiny"))


def failed(checkpoint):
    return script().run(checkpoint, VIDEO, 3, 8)


def test_the_script_passes(checkpoint):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = [str(SCRIPT.parents[1] / "python"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(reversed(path)), "PYTHONIOENCODING": "utf-8"}
    arguments = ["--model", checkpoint, "--max-new-tokens", "3", "--max-frames", "8"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.rstrip().endswith(PASSED)
    assert len(re.findall("^ok ", done.stdout, re.M)) == 11


def test_the_script_finds_a_wrapper_that_does_nothing(checkpoint, monkeypatch):
    monkeypatch.setattr(
        stage1_module, "prunevid", lambda x, grids, **_: vidtok.Plan.identity([t * h * w for t, h, w in grids])
    )
    assert set(failed(checkpoint)) == {"fewer visual tokens", "the logits are not those of the unreduced model"}


def test_the_script_finds_placeholders_merged_in_place_of_features(checkpoint, monkeypatch):
    original = vidtok.models.visual.InputHook._prefill

    def blind(self, call, arguments, embeds, cache, state):
        """The embedding of the placeholder for every visual token, as a wrapper that runs too early sees it."""
        if call.visual is not None:
            flat = embeds.reshape(-1, embeds.shape[-1]).clone()
            flat[call.visual.columns] = 0.5
            embeds = flat.view_as(embeds)
        return original(self, call, {**arguments, "inputs_embeds": embeds}, embeds, cache, state)

    monkeypatch.setattr(vidtok.models.visual.InputHook, "_prefill", blind)
    assert "the answer depends on the pixels" in failed(checkpoint)


def test_the_script_finds_positions_of_the_first_tokens(checkpoint, monkeypatch):
    def first(self, position, rows, number):
        """Positions counted anew: what is left of the row, from its start."""
        return number.expand(position.shape[0], -1, -1)

    monkeypatch.setattr(vidtok.models.visual.InputHook, "_positions", first)
    assert "prompt tokens have positions of the unreduced prompt" in failed(checkpoint)


def test_automatic_usage(checkpoint):
    from qwen_prunevid import Qwen25VLPruneVid

    model = Qwen25VLPruneVid(
        model_path=checkpoint,
        enable_stage1=True,  # Automatically uses V2
        tau=0.8,
        cluster_ratio=0.5,
        temporal_segment_ratio=0.25,
    )

    result = model.generate(
        video_path=VIDEO,
        question="What is happening?",
        max_new_tokens=100,
    )

    assert isinstance(result, str) and type(model.stage1).__name__ == "Qwen25VLStage1WrapperV2"
    sample = model.report().samples[0]
    assert sample.grid_thw[0] == 8 and sample.tokens_out < sample.tokens_in
    assert model.stage1.current_video_grid_thw is None


def test_manual_usage(checkpoint):
    # transformers 5 has no AutoModelForVision2Seq any more, and AutoProcessor needs torchvision.
    from qwen_prunevid import AutoModelForVision2Seq, Qwen25VLStage1WrapperV2

    model = AutoModelForVision2Seq.from_pretrained(checkpoint)
    stage1 = Qwen25VLStage1WrapperV2(model=model, tau=0.8, cluster_ratio=0.5, temporal_segment_ratio=0.25, verbose=True)
    inputs = Qwen25VLPruneVid(checkpoint, enable_stage1=False).prepare(VIDEO, "What is happening?")
    plain = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )

    stage1.set_video_info(
        video_grid_thw=inputs["video_grid_thw"],
        pixel_values_videos=inputs.get("pixel_values_videos"),
    )
    output = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    stage1.clear_video_info()

    assert not torch.equal(output.logits[0], plain.logits[0])
    direct = Qwen25VLPruneVid(checkpoint)
    text = direct.generate(VIDEO, "What is happening?", max_new_tokens=20)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert text == direct.tokenizer.decode(new, skip_special_tokens=True).strip()
    report = direct.report()
    assert report.tokens_out == stage1.report().tokens_out and report.tokens_out < report.tokens_in


@pytest.mark.parametrize("number", [0, 1])
def test_blocks_of_the_page(checkpoint, number, capsys):
    page = (EXAMPLES.parent / "docs" / "prunevid.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    assert len(blocks) == 2
    code = blocks[number].replace("checkpoints/Qwen2.5-VL-7B-Instruct", checkpoint).replace("video.mp4", VIDEO)
    names = {}
    exec(compile(code, "prunevid.md", "exec"), names)
    assert re.search(r"(\d+) -> (\d+) visual tokens", capsys.readouterr().out)
    if number:
        assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
        names["stage1"].restore()


def test_versions_answer_alike(checkpoint):
    answers, counts = set(), set()
    for version in ("v1", "v2"):
        with Qwen25VLPruneVid(checkpoint, stage1_version=version, max_frames=8) as model:
            answers.add(model.generate(video_path=VIDEO, question="What?", max_new_tokens=20))
            counts.add(tuple(model.report().tokens_out))
    assert len(answers) == len(counts) == 1


def test_several_videos_in_one_question(checkpoint):
    with Qwen25VLPruneVid(checkpoint, max_frames=8) as model:
        model.generate(video_path=[VIDEO, VIDEO], question="Which?", max_new_tokens=3)
        two = model.report().samples
        model.generate(video_path=VIDEO, question="Which?", max_new_tokens=3)
        one = model.report().samples
    assert [s.tokens_out for s in two] == [one[0].tokens_out] * 2
    assert torch.equal(two[0].plan.anchor, two[1].plan.anchor)


def test_prompt_is_the_video_and_the_question(checkpoint):
    model = Qwen25VLPruneVid(checkpoint, max_frames=6, max_pixels=12544)
    inputs = model.prepare(VIDEO, "What?")
    video = load_video(VIDEO, count=6, size=model.patches.size)
    patches = patchify(video.frames, model.patches, resize=False)
    assert torch.equal(inputs["pixel_values_videos"], patches.pixel_values_videos)
    t, h, w = patches.grid_thw
    assert t == 3 and h * w * 14 * 14 <= 12544
    text = model.tokenizer.decode(inputs["input_ids"][0])
    pads = "<|vision_start|>" + "<|video_pad|>" * (t * h * w // 4) + "<|vision_end|>"
    assert text.endswith(f"<|im_start|>user\n{pads}What?<|im_end|>\n<|im_start|>assistant\n")


def test_restored_model_is_unreduced(checkpoint):
    plain = Qwen25VLPruneVid(checkpoint, enable_stage1=False, max_frames=8)
    expected = plain.generate(VIDEO, "What?", max_new_tokens=10)
    assert plain.report().samples == []
    with Qwen25VLPruneVid(checkpoint, max_frames=8) as model:
        model.generate(VIDEO, "What?", max_new_tokens=3)
    assert model.generate(VIDEO, "What?", max_new_tokens=10) == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_bad_input(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "empty").mkdir()
    for path, options, message in (
        (tmp_path, {}, "expected a model among qwen2_5_vl, qwen2_vl, qwen3_vl, got 'llama'"),
        (tmp_path / "empty", {}, r"a folder with a model's config.json, got "),
        (tmp_path / "config.json", {}, "a checkpoint folder or a hub id, got "),
        (tmp_path / "absent", {}, "a checkpoint folder or a hub id, got "),
        (checkpoint, {"stage1_version": "v3"}, "stage1_version 'v1' or 'v2', got 'v3'"),
        (checkpoint, {"tau": 3}, "tau"),
        (checkpoint, {"max_frames": 0}, "max_frames as a whole number of at least 1, got 0"),
        (checkpoint, {"enable_stage2": True, "alpha": 0}, r"alpha in \(0, 1\], got 0"),
        (checkpoint, {"enable_stage2": True, "selected_layer": -1}, "selected_layer as a 0-based layer, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Qwen25VLPruneVid(path, **options)
    model = Qwen25VLPruneVid(checkpoint, max_frames=4)
    for path, question, message in (
        ([], "What?", "expected a video_path, got none"),
        (None, "What?", "expected a video_path, or a sequence of them, got NoneType"),
        (VIDEO, " ", "expected a question, got an empty one"),
        (VIDEO, 5, "expected a question as text, got int"),
        (VIDEO, "<|video_pad|>", "plain text"),
        (tmp_path / "no.mp4", "What?", "no.mp4"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(video_path=path, question=question)
    assert model.generate(VIDEO, "What?", max_new_tokens=2) is not None
    assert model.report().samples[0].tokens_out < model.report().samples[0].tokens_in
