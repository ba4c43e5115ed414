"""Accuracy at equal token counts: every way leaves as many, and the table says who is ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.accuracy import model as models
from bench.accuracy import picture, results, ways
from bench.accuracy.data import normalised, pictures
from bench.accuracy.evaluate import evaluate, left, schedules
from bench.accuracy.results import Line
from bench.accuracy.train import augmented, rate, train

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, as if they had been fetched."""
    out = tmp_path_factory.mktemp("pictures")
    drawn = np.random.default_rng(0)
    for part, count in (("train", 96), ("test", 12)):
        images = drawn.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
        np.savez(out / f"fashion-{part}.npz", images=images, labels=drawn.integers(0, 10, count))
    return out


def sharp(seed: int) -> object:
    """A model whose attention and answers depend on its tokens."""
    model = models.build("fashion", seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def test_every_way_leaves_as_many_tokens(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accuracy.evaluate.EVEN", (3,))
    monkeypatch.setattr("bench.accuracy.evaluate.HALVING", ((2, 3),))
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        models.save(sharp(seed), path)
    lines = evaluate("fashion", folder, dict(enumerate(paths)), images=4)
    plans = schedules(7, 6)
    assert len(lines) == 1 + sum(6 if halving else 4 for _, halving in plans)
    assert {line.tokens for line in lines if line.schedule == "0 0 21 12 0 0"} == {"49 49 28 16 16 16"}
    assert all(0 <= value <= 100 for line in lines for value in line.seeds)
    path = tmp_path / "accuracy.csv"
    results.write(lines, path)
    assert results.read(path) == lines
    assert len(results.table(lines)) == 2 + len(plans)
    assert picture.draw(path).stat().st_size > 5000


def test_unequal_counts_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(sharp(0), tmp_path / "0.safetensors")
    evenly = ways.evenly
    monkeypatch.setattr(ways, "evenly", lambda tokens, keep: evenly(tokens, keep - 1))
    with pytest.raises(RuntimeError, match="with uniform"):
        evaluate("fashion", folder, {0: tmp_path / "0.safetensors"}, images=2)


def test_ways_change_what_they_should(folder: Path) -> None:
    model = sharp(0).eval()  # type: ignore[attr-defined]
    x = normalised(pictures("fashion", folder, "test")[0][:3], "fashion")
    with torch.no_grad():
        plain = model(x).logits
        found = {}
        for way in ways.WAYS:
            with ways.attach(model, way, [0] * 6):
                assert torch.equal(model(x).logits, plain), way
            with ways.attach(model, way, [21, 12, 0, 0, 0, 0]) as handle:
                found[way] = model(x).logits
                assert left(handle.vision[0]) == [28, 16, 16, 16, 16, 16]
            with ways.attach(model, way, [21, 12, 0, 0, 0, 0]):
                assert torch.equal(model(x).logits, found[way]), way
        assert torch.equal(model(x).logits, plain)
    pairs = [(a, b) for a in found for b in found if a < b]
    assert all(not torch.allclose(found[a], found[b]) for a, b in pairs)


def test_pooling_is_the_mean_of_cells() -> None:
    model = sharp(0).eval()  # type: ignore[attr-defined]
    x = torch.randn(2, 50, 64)
    with ways.attach(model, "pool-sized", [21, 12, 0, 0, 0, 0]) as handle:
        run = handle.vision[0].begin(x)
        first = run.step(0).merge(x)
        second = run.step(1).merge(first)
    grid = x[:, 1:].unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(second[:, 1:], wanted)
    assert torch.equal(second[:, 0], x[:, 0])
    assert run.size[2][0].tolist() == [1] + [4, 4, 4, 2] * 3 + [2, 2, 2, 1]
    with pytest.raises(ValueError, match="expected 21 patches"), ways.attach(model, "pool", [5] * 6) as handle:
        handle.vision[0].begin(x).step(0).merge(x)


def test_the_table_says_where_pooling_ties_or_wins() -> None:
    tome = Line("21 0", "tome", "28 28", 38.5, "70.00 71.00 72.00", "data", 100)
    pool = replace(tome, way="pool", accuracy="75.00 76.10 77.00")
    random = replace(tome, way="random", accuracy="50.00 51.00 52.00")
    assert results.verdict(tome, [pool, random]).startswith("**pooling ahead** (-5.0 ± 0.1)")
    assert results.verdict(tome, [random]).startswith("ToMe ahead of random dropping")
    near = replace(pool, accuracy="71.00 70.00 72.10")
    assert results.verdict(tome, [near, random]).startswith("tie with pooling")


def test_training_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accuracy.train.BATCH", 8)
    monkeypatch.setattr("bench.accuracy.train.EVERY", 5)
    monkeypatch.setattr("bench.accuracy.model.config", _small(models.config))
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    train("fashion", folder, 0, whole, epochs=1)
    with monkeypatch.context() as patch:
        calls = iter([None] * 14)

        def stopped(step: int, steps: int) -> float:
            if next(calls, 0) is not None:
                raise KeyboardInterrupt
            return rate(step, steps)

        patch.setattr("bench.accuracy.train.rate", stopped)
        with pytest.raises(KeyboardInterrupt):
            train("fashion", folder, 0, parts, epochs=1)
    assert not parts.exists() and parts.with_suffix(".pt").exists()
    train("fashion", folder, 0, parts, epochs=1)
    assert parts.read_bytes() == whole.read_bytes()
    assert not parts.with_suffix(".pt").exists()


def _small(config: object) -> object:
    return lambda name, **changed: config(name, hidden_size=8, num_hidden_layers=1, intermediate_size=8, **changed)  # type: ignore[operator]


def test_augmentation_moves_whole_pictures() -> None:
    x = torch.arange(40 * 28 * 28.0).view(40, 1, 28, 28)
    out = augmented(x, 2, torch.Generator().manual_seed(0))
    assert out.shape == x.shape
    inner = out[:, :, 4:-4, 4:-4]
    step = inner[..., 1] - inner[..., 0]
    assert set(step.flatten().tolist()) == {1.0, -1.0}
