"""Training pairs and evaluation clips as data sets of torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from vidtok._check import fail
from vidtok.data.retrieval.frames import FrameLoader
from vidtok.data.retrieval.pairs import Pairs
from vidtok.data.retrieval.tokenizer import Words
from vidtok.data.video import VideoError


class TrainingPairs(Dataset):
    """Captions with frames of their clips: what a training step takes.

    Item: ``input_ids``, ``token_type_ids``, ``attention_mask`` int64 ``[max_words]``, ``video`` uint8 ``[T, 3, S, S]``,
    ``video_mask`` int64 ``[T]``, ``unreadable`` the number of a clip that this item replaces, or -1. What is random
    depends on seed, epoch and item alone, whichever worker asks.

    Args:
        pairs: clips and captions.
        words: makes token ids.
        frames: makes frames.
        seed: of frames and captions chosen at random.
        expand: every caption is an item; otherwise every clip is, with a caption chosen anew in each epoch.
        skip_unreadable: in place of a video that does not decode take the next item that does, out of 16.
    """

    def __init__(
        self,
        pairs: Pairs,
        words: Words,
        frames: FrameLoader,
        seed: int = 0,
        expand: bool = True,
        skip_unreadable: bool = False,
    ) -> None:
        self.pairs, self.words, self.frames = pairs, words, frames
        self.seed, self.expand, self.skip_unreadable = seed, expand, skip_unreadable
        self.epoch = 0

    def begin(self, epoch: int) -> None:
        """Change what is random."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs) if self.expand else len(self.pairs.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"expected an item from 0 to {len(self) - 1}, got {index}")
        failed = -1
        for step in range(16 if self.skip_unreadable else 1):
            number = (index + step) % len(self)
            try:
                return {**self._item(number), "unreadable": torch.tensor(failed)}
            except VideoError as error:
                last = error
                failed = self.pairs.owner[number] if self.expand else number
        raise last

    def _item(self, index: int) -> dict[str, Tensor]:
        seed = (self.seed, self.epoch, index)
        caption = index if self.expand else random.Random(repr(("caption", *seed))).choice(self.pairs.of(index))
        frames, mask = self.frames.load(self.pairs.clips[self.pairs.owner[caption]], seed)
        ids, attention = self.words([self.pairs.captions[caption]])
        return {
            "input_ids": ids[0],
            "token_type_ids": torch.zeros_like(ids[0]),
            "attention_mask": attention[0],
            "video": frames,
            "video_mask": mask,
        }


class EvaluationClips(Dataset):
    """Every clip once: ``index``, ``video``, ``video_mask``, and ``readable``.

    A clip that does not decode is an error, or with ``skip_unreadable`` comes black with ``readable`` 0.
    """

    def __init__(self, pairs: Pairs, frames: FrameLoader, skip_unreadable: bool = False) -> None:
        self.pairs, self.frames, self.skip_unreadable = pairs, frames, skip_unreadable

    def __len__(self) -> int:
        return len(self.pairs.clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"expected an item from 0 to {len(self) - 1}, got {index}")
        rule, readable = self.frames.rule, 1
        try:
            frames, mask = self.frames.load(self.pairs.clips[index], ("evaluation", index))
        except VideoError:
            if not self.skip_unreadable:
                raise
            readable = 0
            frames = torch.zeros(rule.count, 3, rule.size, rule.size, dtype=torch.uint8)
            mask = torch.ones(rule.count, dtype=torch.int64)
        return {
            "index": torch.tensor(index),
            "video": frames,
            "video_mask": mask,
            "readable": torch.tensor(readable),
        }


class EpochSampler(Sampler[int]):
    """A new order in every epoch, the same whenever seed and epoch are.

    :meth:`begin` has not the usual name ``set_epoch``, by which accelerate would set its own count of epochs, from 0
    again when training goes on.
    """

    def __init__(self, data: Sized, seed: int = 0) -> None:
        if len(data) < 1:
            fail("at least one item", "none")
        self.data, self.seed, self.epoch = data, seed, 0

    def begin(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        order: list[Any] = list(range(len(self.data)))
        random.Random(repr(("order", self.seed, self.epoch))).shuffle(order)
        return iter(order)
