"""Train one seed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import model as models
from bench.accuracy.data import SETS, normalised, pictures

# Pictures of a step, passes over them, and steps between lines of the log and snapshots.
BATCH, EPOCHS, EVERY = 128, 12, 65


def augmented(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to ``shift`` pixels, the edge reflected, and half of them mirrored."""
    b, _, _, side = x.shape
    x = F.pad(x, (shift,) * 4, mode="reflect")
    top, left = torch.randint(2 * shift + 1, (2, b, 1), generator=generator)
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    columns = torch.where(torch.rand(b, 1, generator=generator) < 0.5, columns.flip(1), columns)
    return x[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def optimizers(model: Any) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the blocks, AdamW for the rest, each with its highest rate."""
    inside = [p for n, p in model.named_parameters() if ".layer" in n and p.ndim == 2]
    ids = set(map(id, inside))
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        (torch.optim.Muon(inside, lr=0.02, weight_decay=0.02, momentum=0.95), 0.02),
        (torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02), 2e-3),
    ]


def rate(step: int, steps: int, warm: int = 150, fall: float = 0.4) -> float:
    """Share of the highest rate: up in a line, constant, and down in a line over the last steps."""
    return min(1.0, (step + 1) / warm, (steps - step) / (fall * steps))


@torch.no_grad()
def accuracy(model: Any, name: str, x: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Share of the pictures that the model names right."""
    found = [model(normalised(part, name)).logits.argmax(-1) for part in x.split(batch)]
    return (torch.cat(found) == labels).float().mean().item()


def _snapshot(path: Path, step: int, model: Any, pairs: Any, generator: torch.Generator, order: Tensor) -> None:
    states = [optimizer.state_dict() for optimizer, _ in pairs]
    held = {"step": step, "model": model.state_dict(), "optimizers": states, "order": order}
    torch.save({**held, "generator": generator.get_state()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(name: str, folder: Path, seed: int, out: Path, epochs: float = EPOCHS) -> float:
    """Train a model, write its weights, and return its accuracy on the test set.

    A run that was stopped goes on from its last snapshot, beside the checkpoint. The learning rate does not depend
    on ``epochs`` before it begins to fall, so until then a run may go on as a longer or shorter one.

    Args:
        name: a key of ``SETS``.
        folder: where its package is or goes.
        seed: of the weights, the order and the augmentation.
        out: the checkpoint; JSON lines of the loss go beside it.
        epochs: passes over the training set.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    held, log = out.with_suffix(".pt"), out.with_suffix(".jsonl")
    images, labels = pictures(name, folder, "train")
    model = models.build(name, seed)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    pairs = optimizers(model)
    each = len(images) // BATCH
    steps, first, order = int(epochs * each), 0, torch.empty(0)
    if held.exists():
        state = torch.load(held)
        first, order = state["step"], state["order"]
        model.load_state_dict(state["model"])
        generator.set_state(state["generator"])
        for (optimizer, _), values in zip(pairs, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    total, start = 0.0, time.time()
    for step in range(first, steps):
        if step % each == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[step % each * BATCH :][:BATCH]
        logits = model(augmented(normalised(images[rows], name), SETS[name].shift, generator)).logits
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        loss.backward()
        for optimizer, highest in pairs:
            optimizer.param_groups[0]["lr"] = highest * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % EVERY == 0:
            line = {"step": step + 1, "epoch": round((step + 1) / each, 2), "loss": round(total / EVERY, 4)}
            with log.open("a") as file:
                file.write(json.dumps({**line, "seconds": round(time.time() - start)}) + "\n")
            total = 0.0
            _snapshot(held, step + 1, model, pairs, generator, order)
    models.save(model, out)
    held.unlink(missing_ok=True)
    return accuracy(models.load(name, out), name, *pictures(name, folder, "test"))
