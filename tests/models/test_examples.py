"""The examples run as they are, and as the ordinary scripts that they were before the added lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "# vidtok"


def run(script, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    path = [str(EXAMPLES), str(EXAMPLES.parent / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_evaluation(tmp_path):
    out = run(EXAMPLES / "evaluate.py", "--visual", "prunevid:tau=0.8")
    assert re.search(r"accuracy \d\.\d\d over 3 questions", out)
    counts = re.findall(r"(\d+) -> (\d+) visual tokens", out)
    assert len(counts) == 3 and all(int(b) < int(a) for a, b in counts)


@pytest.mark.slow
def test_training(tmp_path):
    out = run(EXAMPLES / "train.py", "--output", str(tmp_path), "--steps", "6", "--decoder", "uni_1_0.5")
    first, last = re.search(r"loss (\d+\.\d+) -> (\d+\.\d+)", out).groups()
    assert float(last) < float(first)
    assert "visual tokens from layer 1 on" in out
    assert "'visual_tokens_out'" in out  # in the Trainer's own log
    assert any(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_a_vit_of_ones_own(tmp_path):
    lines = (EXAMPLES / "custom_vit.py").read_text().splitlines(keepends=True)
    marked = [line for line in lines if line.rstrip().endswith(MARK)]
    assert 10 <= len(marked) <= 20
    out = run(EXAMPLES / "custom_vit.py", "--steps", "40", "--merge", "tome:r=0", "tome:r=12")
    plain, same, merged = re.findall(r"accuracy (\d\.\d+)", out)
    assert plain == same and 0.25 < float(merged) <= 1
    assert "tome:r=12: " in out and "tokens 65 53 41 29 17" in out
    bare = tmp_path / "bare.py"
    bare.write_text("".join(line for line in lines if line not in marked))
    out = run(bare, "--steps", "1")
    assert out.startswith("plain: accuracy") and len(out.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, arguments", [("evaluate.py", []), ("train.py", ["--steps", "2"])])
def test_without_the_added_lines(tmp_path, name, arguments):
    lines = (EXAMPLES / name).read_text().splitlines(keepends=True)
    marked = [line for line in lines if line.rstrip().endswith(MARK)]
    assert 4 <= len(marked) <= 6
    plain = tmp_path / name
    plain.write_text("".join(line for line in lines if line not in marked))
    out = run(plain, *arguments)
    assert "visual tokens" not in out
    assert re.search("accuracy|loss", out)
