"""Command lines of retrieval: both parsers, the published script, and input that costs one sentence."""

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

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState

from tests.cli.conftest import Said
from tests.cli.retrieval_calls import training
from vidtok.cli import retrieval
from vidtok.cli.retrieval_model import check_fit
from vidtok.cli.retrieval_options import RetrievalOptions, make, parse
from vidtok.data.retrieval import Words, load_tokenizer

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
