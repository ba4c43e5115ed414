"""Accuracy of the checkpoints with the tokens reduced in every way, at equal counts."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import torch

import vidtok
from bench.accuracy import model as models
from bench.accuracy.data import SETS, pictures
from bench.accuracy.results import Line
from bench.accuracy.train import accuracy
from bench.accuracy.ways import WAYS, attach, halved
from bench.row import commit

# Patches away after every block, and blocks after which the grid halves, which pooling can do too.
EVEN = (2, 4, 5, 6, 7, 8)
HALVING = ((3,), (2,), (0,), (2, 3), (0, 1), (0, 1, 2), (0, 1, 2, 3))


def schedules(side: int, blocks: int) -> list[tuple[list[int], bool]]:
    """Patches away after each block, and whether pooling can do it, for a square of patches."""
    out = [([r] * blocks, False) for r in EVEN]
    for places in HALVING:
        grid, away = (side, side), [0] * blocks
        for place in places:
            smaller = halved(grid)
            away[place] = grid[0] * grid[1] - smaller[0] * smaller[1]
            grid = smaller
        out.append((away, True))
    return out


def left(merging: object) -> list[int]:
    """Patches that the last pass left after each block."""
    run = merging.run  # type: ignore[attr-defined]
    return [count - run.protected[0] for count in run.tokens[1:]]


def evaluate(name: str, folder: Path, checkpoints: dict[int, Path], images: int = 10_000) -> list[Line]:
    """One line for each way and schedule.

    Args:
        name: a key of ``SETS``.
        folder: where its package is or goes.
        checkpoints: one for each seed, which is also that of what is drawn.
        images: how many of the test pictures, the first ones.

    Raises:
        RuntimeError: where two ways of a schedule would leave different numbers of tokens.
    """
    seen, truth = (part[:images] for part in pictures(name, folder, "test"))
    shared = {
        "data": SETS[name].title,
        "images": len(seen),
        "versions": f"vidtok {vidtok.__version__}, torch {torch.__version__}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    held = {seed: models.load(name, path) for seed, path in checkpoints.items()}
    config = next(iter(held.values())).config
    side, blocks = config.image_size // config.patch_size, config.num_hidden_layers
    patches = side * side

    def percent(values: list[float]) -> str:
        return " ".join(f"{100 * value:.2f}" for value in values)

    plain = percent([accuracy(model, name, seen, truth) for model in held.values()])
    lines = [Line("none", "none", "all", float(patches), plain, **shared)]  # type: ignore[arg-type]
    for schedule, halving in schedules(side, blocks):
        counts: list[int] = []
        for way in WAYS:
            if way.startswith("pool") and not halving:
                continue
            values = []
            for seed, model in held.items():
                with attach(model, way, schedule, seed) as handle:
                    values.append(accuracy(model, name, seen, truth))
                    found = left(handle.vision[0])
                if counts and found != counts:
                    raise RuntimeError(f"expected {counts} patches after the blocks, got {found} with {way}")
                counts = found
            entering = [patches, *counts[:-1]]
            lines.append(
                Line(
                    " ".join(map(str, schedule)),
                    way,
                    " ".join(map(str, counts)),
                    round(sum(entering + counts) / (2 * len(counts)), 2),
                    percent(values),
                    **shared,  # type: ignore[arg-type]
                )
            )
    return lines
