"""``vidtok train retrieval``, ``vidtok eval retrieval`` and the published script's command line."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizerFast

from tests.cli.conftest import Said
from tests.data.retrieval.make import msrvtt, tiny_checkpoint
from vidtok.cli import retrieval
from vidtok.cli.retrieval_model import check_fit
from vidtok.cli.retrieval_options import RetrievalOptions, make, parse
from vidtok.data.retrieval import Words, load_tokenizer
from vidtok.evaluation import Scores

pytestmark = pytest.mark.usefixtures("fresh")
ROOT = Path(__file__).parents[2]
PUBLISHED = """
python main.py \\
    --do_train 1 \\
    --data_path data/MSRVTT_data.json \\
    --features_path data/MSRVTT_Videos \\
    --output_dir output/tome_msrvtt \\
    --max_words 32 \\
    --max_frames 12 \\
    --batch_size 128 \\
    --lr 1e-4 \\
    --epochs 5 \\
    --tome_r 2 \\
    --tome_prop_attn \\
    --pretrained_clip_name "ViT-B/32" \\
    --sim_header "meanP" \\
    --temporal_prompt "DGL"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = msrvtt(tmp_path_factory.mktemp("set"))
    return {**files, "clip": tiny_checkpoint(files["root"] / "clip", files["tokenizer"])}


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


def test_the_end_of_a_text_is_its_largest_id(made: dict[str, Path]) -> None:
    words = Words(load_tokenizer(made["tokenizer"]), 12)
    model = SimpleNamespace(sizes=SimpleNamespace(context=16, vocabulary=1000))
    check_fit(model, words)
    words.tokenizer.add_tokens(["further"])
    end = words.tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"end token has its largest id, {end + 1}, got {end}"):
        check_fit(model, words)


def test_an_output_folder_that_is_a_file(call: Callable[..., Said], made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = call(*training(made, tmp_path / "file"))
    assert said.code == 2 and "expected --output_dir as a folder that can be made, got " in said.err
    assert "Training:" not in said.err


def script() -> Any:
    spec = importlib.util.spec_from_file_location("stop_main", ROOT / "examples/stop/main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_may_be_stopped(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieval, "run", stopped)
    assert script().main(published()) == 130
    assert capsys.readouterr().err == ""


def published() -> list[str]:
    return shlex.split(PUBLISHED.replace("\\\n", " "))[2:]


def test_the_published_command_line_parses() -> None:
    options = parse(published())
    assert (options.do_train, options.do_eval, options.tome_r, options.tome_prop_attn) == (1, 1, "2", True)
    assert (options.max_frames, options.batch_size, options.lr, options.temporal_prompt) == (12, 128, 1e-4, "DGL")
    assert parse(["--no-tome_prop_attn", "--tome-trace-source", "--do_train"]).tome_prop_attn is False
    assert parse(["--do_train"]).do_train == 1 and parse([]).do_train == 0 and parse(["--do_eval"]).do_eval == 1
    assert parse(["--do_train", "1", "--do_eval", "0"]).do_eval == 0


def test_the_published_command_line_runs(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vidtok.data.retrieval import load_tokenizer
    from vidtok.systems.stop import tiny

    (tmp_path / "data").mkdir()
    (tmp_path / "data/MSRVTT_Videos").symlink_to(made["videos"])
    for name in ("MSRVTT_JSFUSION_test.csv", "MSRVTT_train.9k.csv", "MSRVTT_data.json"):
        (tmp_path / "data" / name).write_bytes((made["root"] / name).read_bytes())
    # 16 captions do not fill a batch of 128: every caption 8 times.
    content = json.loads((tmp_path / "data/MSRVTT_data.json").read_text())
    content["sentences"] *= 8
    (tmp_path / "data/MSRVTT_data.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script().main(published()) == 2
    said = capsys.readouterr().err
    assert "a name in the hub's cache or ViT-B-32.pt in ., modules, ~/.cache/clip, got 'ViT-B/32'" in said
    AcceleratorState._reset_state(True)
    # A backbone of one head of 64 channels, in the form of the original release, where that is kept.
    model = tiny(32, 16, 64, 2, 1, context=32, vocabulary=560, text_width=64, text_heads=1, seed=0)
    kept = tmp_path / ".cache/clip"
    kept.mkdir(parents=True)
    torch.save({"state_dict": model.clip.state_dict()}, kept / "ViT-B-32.pt")
    load_tokenizer(made["tokenizer"]).save_pretrained(str(kept))
    assert script().main([*published(), "--epochs", "1", "--no-isolate", "--device", "cpu"]) == 0
    assert (tmp_path / "output/tome_msrvtt/model/model.safetensors").is_file()
    assert "Text to video" in capsys.readouterr().out


def test_both_parsers_have_the_same_options(call: Callable[..., Said]) -> None:
    said = call("train", "retrieval", "--help")
    assert said.code == 0
    for name in RetrievalOptions.__dataclass_fields__:
        if name != "given":
            assert f"--{name}" in said.out and f"--{name.replace('_', '-')}" in said.out
    assert make({"lr": None, "tome_r": "3"}) == RetrievalOptions(tome_r="3", given=frozenset({"tome_r"}))
    assert call("train").code == 0 and "retrieval" in call("eval").out


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom vidtok.cli.main import main\nmain(['train', 'retrieval', '--help'])\n"
    code += "print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "python")
    assert done.stdout.rstrip().endswith("[]")


def test_presets() -> None:
    chosen = retrieval._preset(make({"preset": "prototyping"}))
    assert (chosen.tome_r, chosen.max_frames) == ("8", 8) and {"tome_r", "max_frames"} <= chosen.given
    chosen = retrieval._preset(make({"preset": "inference", "max_frames": 4}))
    assert (chosen.tome_r, chosen.max_frames) == ("4", 4)


def test_merges() -> None:
    assert (
        retrieval.merges("0") == 0 and retrieval.merges("8, 4,2") == [8, 4, 2] and retrieval.merges("8:-1") == (8, -1)
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tome_r", "-1"], "--tome_r as a whole number of at least 0"),
        (["--tome_r", "many"], "--tome_r as a whole number of at least 0"),
        (["--tome_r", "1,2,3"], "expected"),
        (["--datatype", "ucf"], "a datatype among"),
        (["--preset", "fast"], "a preset among training, inference, prototyping, got 'fast'"),
        (["--amp", "fp16"], "a GPU for fp16"),
        (["--batch_size", "999"], "at least one batch of 999 pairs"),
        (["--max_words", "200"], "--max_words of at most 16"),
        (["--pretrained_clip_name", "no/such/thing"], "expected --pretrained_clip_name as a path"),
        (["--tokenizer", "."], "a CLIP tokenizer"),
        (["--init_model", "nowhere"], "expected --init_model as weights"),
        (["--do_train", "0", "--do_eval", "0"], "--do_train 1 or --do_eval 1"),
        (["--sim_header", "seqTransf"], "sim_header"),
        (["--temporal_prompt", "group9"], "temporal_prompt"),
        (["--slice_framepos", "7"], "--slice_framepos among 0, 1, 2"),
        (["--split", "train"], "--split among test, val"),
        (["--max_frames", "0"], "--max_frames of at least 1"),
        (["--train_csv", "absent.csv"], "1 of 1 missing"),
        (["--resume", "nowhere"], "a checkpoint folder"),
        (["--lr", "fast"], "'--lr'"),
        (["--lr", "1e300"], "lr of at least 0 and at most 1e15"),
        (["--seed", str(2**70)], "a seed from 0"),
        (["--max_frames", str(2**70)], "count of at least 1 and at most 65536"),
        (["--image_size", "100000"], "size of at least 1 and at most 8192"),
        (["--frame_cache_gb", "nan"], "--frame_cache_gb above 0"),
        (["--frame_cache", "a\0b"], "--frame_cache of at most 4096 characters without NUL"),
        (["--output_dir", ""], "expected --output_dir, got none"),
        (["--video_backend", "vlc"], "--video_backend among auto, decord, pyav"),
    ],
)
def test_bad_input_costs_one_sentence(
    call: Callable[..., Said], made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = call(*training(made, tmp_path / "out", *arguments))
    last = said.err.strip().splitlines()[-1]
    assert said.code == 2 and last.startswith("vidtok: ") and says in last
    assert not (tmp_path / "out/metrics.json").exists()


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


@pytest.mark.parametrize(("module", "name"), [("accelerate", "accelerate"), ("torch.utils.tensorboard", "tensorboard")])
def test_missing_packages(
    call: Callable[..., Said],
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    said = call(*training(made, tmp_path / "out", "--tensorboard"))
    last = said.err.strip().splitlines()[-1]
    assert said.code == 2 and last.startswith(f"vidtok: expected the package {name}") and last.endswith("got none")


DAMAGE = [b"", b"damaged", b"PK\x03\x04 no archive", b"{}"]
DAMAGED = [
    (o, n, d) for o in ("--pretrained_clip_name", "--init_model") for n in ("model.safetensors", "a.pt") for d in DAMAGE
]
DAMAGED += [("--pretrained_clip_name", "config.json", d) for d in DAMAGE[:3]]


@pytest.mark.parametrize(("option", "name", "content"), DAMAGED)
def test_damaged_weights(
    call: Callable[..., Said], made: dict[str, Path], tmp_path: Path, option: str, name: str, content: bytes
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(made["clip"], folder)
    (folder / name).write_bytes(content)
    said = call(*training(made, tmp_path / "out", option, folder / name if name == "a.pt" else folder))
    assert said.code == 2 and said.err.strip().splitlines()[-1].startswith("vidtok: expected ")


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
