"""A small model with dropout and pairs without videos, for tests and for the processes they start."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.data.retrieval import (
    Clip,
    EvaluationClips,
    FrameRule,
    Pairs,
    TrainingPairs,
    Words,
    load_tokenizer,
    train_tokenizer,
)
from vidtok.evaluation import evaluate
from vidtok.systems.stop import gather, symmetric_cross_entropy
from vidtok.training.retrieval import Recipe, accelerator_for, train

RECIPE = Recipe(lr=1e-2, coef_lr=0.5, epochs=4, batch_size=4, seed=1)


class Noise:
    """Frames that depend on the clip, and a little on the seed."""

    rule = FrameRule(2, 4, shift=True)

    def load(self, clip: Clip, seed: object = None) -> tuple[Tensor, Tensor]:
        base = torch.Generator().manual_seed(int(clip.name))
        shift = torch.Generator().manual_seed(random.Random(repr(seed)).randrange(1 << 30))
        frames = torch.randint(0, 200, (2, 3, 4, 4), generator=base)
        return (frames + torch.randint(0, 20, frames.shape, generator=shift)).to(torch.uint8), torch.ones(2).long()


class Small(nn.Module):
    """``clip`` is the part with its own rate; dropout makes the random state matter."""

    def __init__(self, dropout: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.clip = nn.Linear(48, 8)
            self.words = nn.Embedding(600, 8)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def parameter_groups(self, lr: float, coef_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        rest = [p for n, p in self.named_parameters() if not n.startswith("clip.") and p.requires_grad]
        own = [p for p in self.clip.parameters() if p.requires_grad]
        return [
            {"params": own, "lr": lr * coef_lr, "weight_decay": weight_decay},
            {"params": rest, "lr": lr, "weight_decay": 0.0},
        ]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(self.dropout(self.words(ids) * mask[..., None]).sum(1), dim=-1)

    def encode_video(self, video: Tensor, mask: Tensor) -> Tensor:
        self.seen = video[..., 0, 0]
        return F.normalize(self.dropout(self.clip(video.flatten(2))).mean(1), dim=-1)

    def source_map(self) -> Tensor:
        """Numbers by which clips, frames and places can be told."""
        return self.seen.flatten(0, 1).mul(1000).round().long()

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor, video: Tensor, video_mask: Tensor) -> Tensor:
        text, clips = gather(self.encode_text(ids, mask)), gather(self.encode_video(video, video_mask))
        return symmetric_cross_entropy(self.logit_scale.exp() * text @ clips.t())


class Each(Small):
    """A loss that is a mean over pairs, so that parts of a batch add up to it."""

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor, video: Tensor, video_mask: Tensor) -> Tensor:
        return 1 - (self.encode_text(ids, mask) * self.encode_video(video, video_mask)).sum(-1).mean()


def pairs_of(folder: Path, clips: int = 8, seed: int = 0, **options: Any) -> TrainingPairs:
    """Two captions for each clip."""
    texts = [f"{word} number {i}" for i in range(clips) for word in ("clip", "film")]
    words = Words(load_tokenizer(train_tokenizer(texts, folder / "words", 540)), 10)
    pairs = Pairs(
        tuple(Clip(str(i), Path(f"{i}.mp4")) for i in range(clips)),
        tuple(texts),
        tuple(i // 2 for i in range(len(texts))),
    )
    loader: Any = Noise()
    return TrainingPairs(pairs, words, loader, seed, **options)


def run(data: TrainingPairs, folder: Path, recipe: Recipe = RECIPE, model: Any = None, **options: Any) -> Any:
    return train(model or Small(), data, recipe, folder, accelerator=accelerator_for(recipe, cpu=True), **options)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def scores(model: nn.Module, data: TrainingPairs, accelerator: Any = None) -> dict[str, Any]:
    """Of 8 clips in batches of 3: two processes have to fill up."""
    clips = EvaluationClips(data.pairs, data.frames)
    found = evaluate(model, clips, data.words, batch_size=3, accelerator=accelerator, sources=True)
    place = torch.arange(1, 1 + found["sources"].numel()).view_as(found["sources"])
    sources = {"clips": len(found["clips"]), "sum": int((place * found["sources"]).sum())}
    return {"sources": sources, **{k: v.as_dict() for k, v in found.items() if hasattr(v, "as_dict")}}


def process(folder: str) -> None:
    """What each of two processes of the DDP test does."""
    torch.set_num_threads(1)
    recipe = Recipe(lr=1e-2, coef_lr=1.0, epochs=2, batch_size=8, seed=3)
    accelerator = accelerator_for(recipe, cpu=True)
    with accelerator.main_process_first():
        data = pairs_of(Path(folder))
    done = train(
        Small(0.0), data, recipe, Path(folder) / "two", accelerator=accelerator, log_every=1,
        evaluate=lambda model, epoch: scores(model, data, accelerator),
    )  # fmt: skip
    # A process killed before the last evaluation: both evaluate when they go on.
    log = Path(folder) / "two/log.jsonl"
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    accelerator.wait_for_everyone()
    again = train(
        Small(0.0), data, recipe, Path(folder) / "two", accelerator=accelerator_for(recipe, cpu=True), resume="auto",
        evaluate=lambda model, epoch: scores(model, data, accelerator),
    )  # fmt: skip
    assert again.scores == done.scores[-1:]
    if accelerator.is_main_process:
        torch.save({"state": state(done.model), "scores": done.scores}, Path(folder) / "two.pt")
    accelerator.end_training()
