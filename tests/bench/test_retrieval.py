"""The retrieval table: every way leaves as many tokens, and the README says what the CSV says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import retrieval
from bench.retrieval import Line

av = pytest.importorskip("av")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def example(name: str) -> Any:
    """A script of ``examples/retrieval`` as a module."""
    found = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / "retrieval" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A set of noise in place of the packages, and an untrained model of it."""
    made = example("make_set")
    drawn = np.random.default_rng(0)
    noise = {s: drawn.integers(0, 256, (30, 84, 100, 3), dtype=np.uint8) for s in made.SCENES}
    made.stretch = lambda cache, scene, test: noise[scene][21:] if test else noise[scene][:21]
    made.cutouts = lambda cache, test: (drawn.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20) % 10)
    out = tmp_path_factory.mktemp("set")
    made.make(out, out / "set", train=12, test=6)
    example("make_model").make(out / "set", out / "model")
    return out / "set", out / "model", made


def test_a_set_has_the_layout_and_new_captions(folders: tuple[Path, Path, Any]) -> None:
    from vidtok.data.retrieval import load_pairs

    data, _, made = folders
    train = load_pairs("msrvtt", "train", str(data), str(data / "videos"))
    test = load_pairs("msrvtt", "test", str(data), str(data / "videos"))
    assert (len(train.clips), len(train.captions), len(test.clips)) == (12, 24, 6)
    assert len(set(test.captions)) == 6

    def said(text: str) -> tuple[str, ...]:
        return tuple(
            max((w for w in words if w in text), key=len)
            for words in (made.THINGS.values(), made.COLOURS, made.PATHS, [s.text for s in made.SCENES])
        )

    assert not {said(t) for t in test.captions} & {said(t) for t in train.captions}
    with av.open(str(data / "videos" / "video0.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == made.FRAMES and frames[0].shape == (64, 64, 3)


def test_the_same_seed_gives_the_same_set(folders: tuple[Path, Path, Any], tmp_path: Path) -> None:
    data, _, made = folders
    drawn = np.random.default_rng(0)
    clips = drawn.integers(0, 256, (20, 84, 100, 3), dtype=np.uint8)
    thing = drawn.integers(0, 256, (28, 28), dtype=np.uint8)
    import random

    one, two = (made.compose(clips, thing, "red", "along the top", random.Random(3)) for _ in range(2))
    assert np.array_equal(one, two)
    made.write(one, tmp_path / "a.mp4")
    made.write(two, tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(json.loads((data / "MSRVTT_data.json").read_text())["sentences"]) == 30


def test_measure_and_block(folders: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model, _ = folders
    lines = retrieval.measure(data, model, [0, 8], frames=2, draws=2, repeats=1)
    assert [(line.way, line.r) for line in lines] == [("tome", 0)] + [(way, 8) for way in retrieval.WAYS]
    assert {line.tokens for line in lines[1:]} == {"57 49 41 41"}
    assert [line.draws for line in lines] == [1, 1, 1, 1, 2]
    assert all(line.ms > 0 and 0 <= line.t2v_r1 <= line.t2v_r10 <= 100 for line in lines)
    path = tmp_path / "bench" / "retrieval.csv"
    path.parent.mkdir()
    retrieval.write(lines, path)
    assert retrieval.read(path) == lines
    monkeypatch.setattr(retrieval, "ROOT", tmp_path)
    rows = retrieval.block(path).splitlines()
    assert sum("random dropping" in row for row in rows) == 1 and "[All numbers](bench/retrieval.csv)" in rows[0]


def test_dropping_leaves_as_many_as_merging(folders: tuple[Path, Path, Any]) -> None:
    import torch

    from vidtok.systems.stop import load

    model = load(folders[1]).eval()
    video = torch.randn(2, 2, 3, 64, 64)
    found = {}
    with torch.no_grad():
        plain = model.encode_video(video)
        for way in retrieval.WAYS:
            with retrieval.reduced(model, way, 8):
                found[way] = model.encode_video(video)
                assert list(model.run.tokens) == [65, 57, 49, 41, 0], way
        assert torch.equal(model.encode_video(video), plain)
    assert all(not torch.allclose(found[a], found[b]) for a in found for b in found if a < b)


def test_nothing_measured_says_so(tmp_path: Path) -> None:
    assert retrieval.block(tmp_path / "none.csv") == "Not yet measured.\n"
    assert list(Line.__dataclass_fields__)[:3] == ["way", "r", "tokens"]


@pytest.mark.parametrize("prompt", ["none", "DGL"])
def test_every_way_is_its_own(prompt: str) -> None:
    import torch

    from vidtok.systems.stop import tiny

    torch.manual_seed(0)
    model = tiny(temporal_prompt=prompt).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv1" not in name:
                p.mul_(2.5)
    video, mask = torch.randn(2, 3, 3, 32, 32), torch.ones(2, 3)
    found = []
    for way in ("tome", "uniform", "random"):
        with torch.no_grad(), retrieval.reduced(model, way, 4):
            found.append(model.encode_video(video, mask))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])
