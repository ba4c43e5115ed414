"""``vidtok train retrieval`` and ``vidtok eval retrieval``: what their runs leave."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizerFast

from tests.cli.conftest import Said
from tests.cli.retrieval_calls import common, training
from tests.data.retrieval.make import tiny_checkpoint
from vidtok.cli import retrieval
from vidtok.evaluation import Scores

pytestmark = pytest.mark.usefixtures("fresh")


def test_training_then_scoring(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    said = call(*training(made, tmp_path / "out", "--epochs", 16, "--tome_r", 1))
    assert said.code == 0, said.err
    assert "Training on 8 videos with 16 captions" in said.err and "Epoch 16: text to video R@1" in said.err
    assert "Text to video" in said.out and "MnR" in said.out
    first = json.loads((tmp_path / "out/metrics.json").read_text())
    # Chance is 12.5.
    assert first["text_to_video"]["R@1"] >= 50 and first["text_to_video"]["queries"] == 8
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 32 and losses[-1] < losses[0]
    assert [line["epoch"] for line in lines if "text_to_video/R@1" in line] == list(range(16))
    said = call("eval", "retrieval", *common(made, tmp_path / "two"), "--pretrained-clip-name", tmp_path / "out/model")
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "two/metrics.json").read_text()) == first
    best = [line["text_to_video/R@1"] for line in lines if "text_to_video/R@1" in line]
    said = call("eval", "retrieval", *common(made, tmp_path / "two"), "--pretrained-clip-name", tmp_path / "out/best")
    assert json.loads((tmp_path / "two/metrics.json").read_text())["text_to_video"]["R@1"] == max(best)


def test_resuming(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    options = ["--epochs", 2, "--do_eval", 0, "--temporal_prompt", "DGL", "--tome_r", 2]
    call(*training(made, tmp_path / "whole", *options))
    call(*training(made, tmp_path / "parts", *options, "--stop_after", 2))
    said = call(*training(made, tmp_path / "parts", *options, "--resume", "auto"))
    assert said.code == 0, said.err
    files = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    said = call(*training(made, tmp_path / "parts", *options, "--resume", "auto", "--seed", 7))
    assert said.code == 2 and "seed 42 instead of 7" in said.err and said.err.count("vidtok: ") == 1


def test_the_best_epoch_is_that_of_all_parts_of_a_run(
    call: Callable[..., Said], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([50.0, 20.0, 60.0, 10.0])

    def evaluate(*_: Any, **__: Any) -> dict[str, Any]:
        both = Scores(next(found), 0.0, 0.0, 1.0, 1.0, 8)
        return {"text_to_video": both, "video_to_text": both, "unreadable": []}

    monkeypatch.setattr("vidtok.evaluation.retrieval.evaluate", evaluate)

    def best() -> tuple[float, bytes]:
        scores = json.loads((tmp_path / "best/metrics.json").read_text())
        return scores["text_to_video"]["R@1"], (tmp_path / "best/model.safetensors").read_bytes()

    assert call(*training(made, tmp_path, "--epochs", 3, "--stop_after", 2)).code == 0
    first = best()
    assert call(*training(made, tmp_path, "--epochs", 3, "--stop_after", 2, "--resume", "auto")).code == 0
    assert best() == first and first[0] == 50
    assert call(*training(made, tmp_path, "--epochs", 3, "--resume", "auto")).code == 0
    assert best()[0] == 60 and best()[1] != first[1]
    # A run from the beginning owes nothing to the one before it.
    shutil.rmtree(tmp_path / "checkpoints")
    assert call(*training(made, tmp_path, "--epochs", 1, "--resume", "auto")).code == 0
    assert best()[0] == 10


def test_prompts_that_nothing_trained_are_told_of(
    call: Callable[..., Said], made: dict[str, Path], tmp_path: Path
) -> None:
    options = ["eval", "retrieval", *common(made, tmp_path), "--max_words", 12, "--pretrained_clip_name"]
    said = "the prompts of DGL are not trained but random"
    assert said in " ".join(call(*options, write_clip_alone(made, tmp_path / "clip")).err.split())
    plain = call(*options, tmp_path / "clip", "--temporal_prompt", "none")
    assert plain.code == 0 and said not in plain.err


def write_clip_alone(made: dict[str, Path], folder: Path) -> Path:
    """Weights of CLIP without the settings of a retrieval model."""
    shutil.copytree(made["clip"], folder)
    state = load_file(folder / "model.safetensors")
    state = {k.removeprefix("clip."): v for k, v in state.items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    return folder


def test_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk = retrieval.Talk(True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with talk.bar("Training") as training:
        training(1, 4, "loss 0.5")
        with talk.bar("Evaluating") as evaluating:
            evaluating(2, 3)
            talk("a note")
            bars = talk._bars
            assert [(t.description, t.completed, t.total) for t in bars.tasks] == [
                ("Training loss 0.5", 1, 4), ("Evaluating", 2, 3),
            ]  # fmt: skip
        assert len(bars.tasks) == 1
    assert talk._bars is None and bars.finished and "a note" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with talk.bar("Training") as training:
        training(1, 4)
    with retrieval.Talk(False).bar("Training"):
        retrieval.Talk(False)("from another process")
    assert capsys.readouterr().err == ""


def test_a_run_killed_while_it_writes_a_model_leaves_the_one_before(
    call: Callable[..., Said], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {f"{n}/{p.name}": p.read_bytes() for n in ("model", "best") for p in (tmp_path / n).iterdir()}

    assert call(*training(made, tmp_path, "--epochs", 1)).code == 0
    before = files()
    assert {"model/model.safetensors", "best/metrics.json", "best/tokenizer.json"} <= before.keys()
    shutil.rmtree(tmp_path / "checkpoints")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    # The weights are written, the tokenizer beside them is not.
    monkeypatch.setattr(CLIPTokenizerFast, "save_pretrained", killed)
    assert call(*training(made, tmp_path, "--epochs", 1, "--seed", 7)).code == 130
    assert files() == before
    shutil.rmtree(tmp_path / "checkpoints")
    assert call(*training(made, tmp_path, "--epochs", 1, "--seed", 7, "--do_eval", 0)).code == 130
    assert files() == before


def test_where_every_patch_went(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    from vidtok.data.retrieval import EvaluationClips, FrameLoader, FrameRule, load_pairs, normalize
    from vidtok.systems.stop import load

    said = call(*training(made, tmp_path, "--epochs", 1, "--tome_r", 3, "--tome_trace_source"))
    assert said.code == 0, said.err
    with np.load(tmp_path / "sources.npz") as found:
        clips, sources = found["clips"].tolist(), found["sources"]
    assert clips == [f"video{i}" for i in range(8)] and sources.shape == (8, 2, 17) and sources.dtype == np.int16
    pairs = load_pairs("msrvtt", "test", made["data"], made["videos"])
    model = load(tmp_path / "model", tome_trace_source=True).eval()
    data = EvaluationClips(pairs, FrameLoader(FrameRule(2, 32)))
    with torch.no_grad():
        model.encode_video(normalize(torch.stack([data[i]["video"] for i in range(8)])))
    assert np.array_equal(sources.reshape(16, 17), model.source_map())
    assert (sources[..., 0] == 0).all() and all(len(set(frame)) == 14 for frame in sources.reshape(16, 17).tolist())
    scoring = ["eval", "retrieval", *common(made, tmp_path), "--pretrained_clip_name", tmp_path / "model"]
    # What was asked for once stays with the model; without merging there is nothing to tell, and nothing old stays.
    said = call(*scoring, "--batch_size_val", 3)
    with np.load(tmp_path / "sources.npz") as found:
        assert said.code == 0 and np.array_equal(found["sources"], sources)
    said = call(*scoring, "--tome_r", 0)
    assert said.code == 0 and "No tokens merge" in said.err and not (tmp_path / "sources.npz").exists()
    assert call(*scoring, "--no-tome_trace_source").code == 0 and not (tmp_path / "sources.npz").exists()
    assert "sources" not in json.loads((tmp_path / "metrics.json").read_text())


def test_missing_videos(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for path in sorted(made["videos"].iterdir())[:7]:
        (tmp_path / "videos" / path.name).symlink_to(path)
    (tmp_path / "videos/video7.mp4").write_bytes(b"this does not decode")
    (tmp_path / "videos/video3.mp4").unlink()
    options = ["eval", "retrieval", *common(made, tmp_path / "out"), "--pretrained_clip_name", made["clip"]]
    options += [
        "--features_path",
        tmp_path / "videos",
        "--max_words",
        16,
        "--max_frames",
        2,
        "--temporal_prompt",
        "none",
    ]
    said = call(*options)
    assert said.code == 2 and "1 of 8 videos missing in 'videos': video3" in said.err
    for workers in (0, 1):
        link = tmp_path / "videos/video3.mp4"
        link.symlink_to(made["videos"] / "video3.mp4")
        said = call(*options, "--num_thread_reader", workers)
        link.unlink()
        last = said.err.strip().splitlines()[-1]
        assert said.code == 2 and last.startswith("vidtok: expected a") and "'video7.mp4'" in last and len(last) < 200
    said = call(*options, "--allow_missing")
    assert (
        said.code == 0
        and "1 of 8 videos missing" in said.err
        and "1 video left out for not decoding: video7" in said.err
    )
    assert "Evaluating on 7 videos with 7 captions" in said.err
    assert json.loads((tmp_path / "out/metrics.json").read_text())["text_to_video"]["queries"] == 6
    (tmp_path / "videos/video6.mp4").unlink()
    (tmp_path / "videos/video6.mp4").write_bytes(b"nor does this")
    assert "2 videos left out for not decoding: video6, video7" in call(*options, "--allow_missing").err


def test_weights_to_begin_from(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", made["tokenizer"], temporal_prompt="DGL")
    said = call(*training(made, tmp_path / "out", "--init_model", other))
    assert said.code == 2 and "--init_model with the model's own keys, got" in said.err and "stop." in said.err
    said = call(*training(made, tmp_path / "out", "--init_model", made["clip"], "--epochs", 1, "--do_eval", 0))
    assert said.code == 0, said.err
