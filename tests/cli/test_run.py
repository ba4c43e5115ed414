"""``vidtok run`` end to end on a tiny checkpoint, and every kind of bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vidtok
from tests.cli.conftest import TINY, Said
from tests.data.conftest import write_audio
from vidtok.cli import load, prompt, run, show
from vidtok.data import PatchSpec, load_video, patchify

Call = Callable[..., Said]


def arguments(checkpoint: Path, clip: Path, *more: object) -> list[object]:
    fixed = ["run", "--model", checkpoint, "--video", clip, "--question", "What is seen?", "--dtype", "float32"]
    return [*fixed, "--max-frames", 8, "--max-new-tokens", 4, *more]


def test_answer_tokens_times_and_memory(call: Call, checkpoint: Path, clip: Path) -> None:
    said = call(*arguments(checkpoint, clip, "--visual", "uniform:ratio=0.5"))
    assert said.code == 0, said.err
    assert "Reduced answer:" in said.out and "visual=uniform:ratio=0.5" in said.out
    # 8 frames of 64 x 96 become 4 x 2 x 3 tokens.
    assert re.search(r"Visual tokens +24 +12", said.out)
    for stage in ("Video decode", "Vision tower", "Decide", "Move", "Prefill", "Decoding", "Peak memory"):
        assert re.search(rf"^{stage} +\S", said.out, re.M), stage
    assert "unreduced" not in said.out and "noise" not in said.out


def test_stages_inside_the_decoder(call: Call, checkpoint: Path, clip: Path) -> None:
    said = call(*arguments(checkpoint, clip, "--visual", "uniform:ratio=0.5", "--decoder", "uni_1_0.5"))
    assert said.code == 0, said.err
    assert "decoder=uni_1_0.5" in said.out
    assert re.search(r"from layer 1 on +24 +6", said.out)
    wrong = call(*arguments(checkpoint, clip, "--decoder", "uni_1"))
    assert wrong.code != 0 and "uni_1" in wrong.err and "Traceback" not in wrong.err
    outside = call(*arguments(checkpoint, clip, "--decoder", "uni_99_0.5"))
    assert outside.code != 0 and "uni_99_0.5" in outside.err and "Traceback" not in outside.err


def test_compare_gives_both_and_the_speed_up(call: Call, checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    said = call(*arguments(checkpoint, clip, "--compare", "--repeat", 2, "--report", page, "--visual", "pool:level=2"))
    assert said.code == 0, said.err
    assert "Unreduced answer:" in said.out and "Speed-up:" in said.out
    assert said.err.count("Answering") == 4 and said.err.count("Warming up") == 2
    assert page.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [page]


def test_ratio_one_answers_like_the_unreduced_model(checkpoint: Path, clip: Path) -> None:
    options = run.Options(str(clip), "What?", "uniform:ratio=1.0", str(checkpoint), 8, dtype="float32", compare=True)
    options = replace(options, max_new_tokens=8)
    outcome = run.execute(options, lambda *_: None)
    assert outcome.full is not None and outcome.reduced.new_tokens == outcome.full.new_tokens
    assert outcome.visual_in == outcome.visual_out == 24


def test_the_model_is_left_as_it_was(clip: Path) -> None:
    loaded = load.random_model(**TINY, max_pixels=12544)
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    options = run.Options(str(clip), "What?", "uniform:ratio=0.5", max_frames=4, dtype="float32", max_new_tokens=2)
    run.execute(options, lambda *_: None, lambda: loaded)
    for module in loaded.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())

    def broken(features: torch.Tensor, grid_thw: object) -> object:
        raise ValueError("expected luck, got none")

    for method in (broken, lambda features, grid_thw: None):
        with pytest.raises((ValueError, TypeError)):
            run._answer(
                options,
                loaded,
                method,
                *_inputs(clip, loaded.spec),
                0.0,
                torch.device("cpu"),
                torch.float32,
                lambda *_: None,
            )
        for module in loaded.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def _inputs(clip: Path, spec: PatchSpec) -> tuple[object, object]:
    video = load_video(clip, count=4, size=spec.size)
    return video, patchify(video.frames, spec, resize=False)


def test_pixels_and_question_reach_the_model(clip: Path) -> None:
    loaded = load.random_model(**TINY, max_pixels=12544)
    video, patches = _inputs(clip, loaded.spec)
    inputs = prompt.build(loaded.model, loaded.tokenizer, video, patches, loaded.spec, "What?")
    pad = loaded.model.config.video_token_id
    t, h, w = patches.grid_thw
    assert int((inputs["input_ids"] == pad).sum()) == t * h * w // 4
    text = loaded.tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert text.endswith("<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n")
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / video.sampled_fps])
    logits = loaded.model(**inputs).logits[0, -1]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].roll(7, 1)
    assert (loaded.model(**inputs).logits[0, -1] - logits).abs().max() > 1e-6


def test_random_models_repeat(clip: Path) -> None:
    one, two = load.random_model(**TINY), load.random_model(**TINY)
    other = load.random_model(**{**TINY, "seed": 1})
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    a, b, c = (m.model.state_dict()[name] for m in (one, two, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_isolated_and_plain_decoding_agree(call: Call, checkpoint: Path, clip: Path) -> None:
    answers = []
    for extra in (["--isolate"], ["--no-isolate"], ["--video-backend", "pyav"]):
        said = call(*arguments(checkpoint, clip, *extra, "--fps", 4))
        assert said.code == 0, said.err
        answers.append(re.search(r"Reduced answer: (.*)", said.out)[1])  # type: ignore[index]
    assert len(set(answers)) == 1


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Path]:
    """Folders that are no checkpoint."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(checkpoint, folder / "weights")
    file = folder / "weights" / "model.safetensors"
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:5000])
    shutil.copytree(checkpoint, folder / "config")
    (folder / "config" / "config.json").write_text("{")
    shutil.copytree(checkpoint, folder / "kind")
    (folder / "kind" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "none").mkdir()
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"--video": "no such file.mp4"}, "does not exist"),
        ({"--video": "http://example.com/a.mp4"}, "does not exist"),
        ({"--video": "@empty"}, "is empty"),
        ({"--video": "@text"}, "no video stream was found"),
        ({"--video": "@truncated"}, "truncated"),
        ({"--video": "@audio"}, "only audio"),
        ({"--visual": "prunevid:tua=1"}, "did you mean tau"),
        ({"--visual": "uniform:ratio=1.5"}, "ratio"),
        ({"--visual": "unifrom"}, "did you mean uniform"),
        ({"--visual": ""}, "method name"),
        ({"--model": "nobody/has-this-model"}, "could not be loaded"),
        ({"--model": "/no/such/folder"}, "checkpoint folder or a hub id"),
        ({"--model": "../escape"}, "checkpoint folder or a hub id"),
        ({"--model": "@weights"}, "whole checkpoint"),
        ({"--model": "@config"}, "model config"),
        ({"--model": "@kind"}, "qwen2_5_vl"),
        ({"--model": "@none"}, "config.json"),
        ({"--question": "  "}, "--question"),
        ({"--question": "what <|video_pad|> now"}, "placeholders"),
        ({"--dtype": "int8"}, "float32, bfloat16"),
        ({"--device": "tpu"}, "auto, cpu, cuda"),
        ({"--device": "cuda:99"}, "GPUs visible"),
        ({"--attn": "magic"}, "sdpa, eager"),
        ({"--position": "moved"}, "keep or renumber"),
        ({"--max-frames": "0"}, "--max-frames of at least 1, got 0"),
        ({"--max-frames": "many"}, "--max-frames"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens"),
        ({"--fps": "-1"}, "--fps as a positive number"),
        ({"--fps": "nan"}, "--fps as a positive number"),
        ({"--max-pixels": "5"}, "--max-pixels"),
        ({"--video-backend": "opencv"}, "auto, decord, pyav"),
        ({"--frobnicate": "1"}, "--frobnicate"),
    ],
)
def test_bad_input_is_one_sentence(
    call: Call,
    checkpoint: Path,
    clip: Path,
    broken: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    words: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "in").mkdir()
    files = {name: tmp_path / "in" / f"{name}.mp4" for name in ("empty", "text", "truncated", "audio")}
    files["empty"].touch()
    files["text"].write_text("no video\n" * 100)
    files["truncated"].write_bytes(clip.read_bytes()[:3000])
    write_audio(files["audio"])
    (tmp_path / "out").mkdir()
    options = {
        "--model": str(checkpoint),
        "--video": str(clip),
        "--question": "What?",
        "--visual": "uniform:ratio=0.5",
        "--max-frames": "4",
        "--max-new-tokens": "2",
        "--dtype": "float32",
        "--report": str(tmp_path / "out" / "page.html"),
    }
    for key, value in changes.items():
        options[key] = str({**files, **broken}[value[1:]]) if value.startswith("@") else value
    said = call("run", *(part for pair in options.items() for part in pair))
    assert said.code == 2, said
    message = said.err.strip().splitlines()[-1]
    assert message.startswith("vidtok: ") and words in message, message
    assert "Traceback" not in said.err and said.err.count("vidtok: ") == 1 and said.out == ""
    assert list((tmp_path / "out").iterdir()) == []


def test_report_that_cannot_be_written(call: Call, checkpoint: Path, clip: Path, tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "missing" / "page.html"):
        said = call(*arguments(checkpoint, clip, "--report", target))
        assert said.code == 2 and "writable folder" in said.err
    before = clip.read_bytes()
    said = call(*arguments(checkpoint, clip, "--report", clip))
    assert said.code == 2 and "another file than --video" in said.err and clip.read_bytes() == before


def test_failure_inside_leaves_nothing(
    call: Call, checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(outcome: object) -> str:
        raise RuntimeError("the printer\nis on fire")

    monkeypatch.setattr("vidtok.cli.page.render", fail)
    said = call(*arguments(checkpoint, clip, "--report", tmp_path / "page.html"))
    assert said.code == 1 and said.err.splitlines()[-1].startswith("vidtok: RuntimeError: the printer is on fire")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="printer"):
        call(*arguments(checkpoint, clip, "--report", tmp_path / "page.html", "--debug"))


def test_answers_cannot_drive_the_terminal(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.decode", lambda *_, **__: "\x1b[2J[red]bold[/red] \x07text"
    )
    show.run(run.Options(str(clip), "What?", "uniform:ratio=0.5", str(checkpoint), 4, dtype="float32"))
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "\x07" not in out and "[red]bold[/red]" in out


def test_spec_object_instead_of_string(clip: Path) -> None:
    """The names on the command line are those of ``vidtok.attach``."""
    loaded = load.random_model(**TINY, max_pixels=12544)
    with vidtok.attach(loaded.model, visual="uniform:ratio=0.5") as handle:
        video, patches = _inputs(clip, loaded.spec)
        inputs = prompt.build(loaded.model, loaded.tokenizer, video, patches, loaded.spec, "What?")
        loaded.model(**inputs)
        assert handle.report().samples[0].grid_thw == (2, patches.grid_thw[1] // 2, patches.grid_thw[2] // 2)
