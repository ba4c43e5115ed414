"""Embedding a data set: batches, clips that do not decode, and the model's mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.data.retrieval.make import msrvtt
from vidtok.data import VideoError
from vidtok.data.retrieval import (
    EvaluationClips,
    FrameLoader,
    FrameRule,
    Pairs,
    Words,
    load_pairs,
    load_tokenizer,
)
from vidtok.evaluation import evaluate, score


class Standin(nn.Module):
    """Texts and clips to numbers that depend on all of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
        self.sizes: list[int] = []

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert not self.training
        return nn.functional.normalize(self.weight[(input_ids * attention_mask) % 64].sum(1), dim=-1)

    def encode_video(self, video: Tensor, video_mask: Tensor) -> Tensor:
        assert not self.training and video.is_floating_point() and float(video.min()) < 0
        self.sizes.append(len(video))
        frames = (video * torch.arange(8 * 8).view(8, 8)).sum((-1, -2)) * video_mask[..., None]
        return nn.functional.normalize(frames.sum(1) @ self.weight[:3], dim=-1)


class Tracer(Standin):
    """Says that tokens merged, by a map with another number everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []
        self.none = False

    def encode_video(self, video: Tensor, video_mask: Tensor) -> Tensor:
        first = sum(m.numel() for m in self.maps)
        self.maps.append(torch.arange(first, first + 4 * video_mask.numel()).view(-1, 4))
        return super().encode_video(video, video_mask)

    def source_map(self) -> Tensor | None:
        return None if self.none else self.maps[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Words]:
    files = msrvtt(tmp_path_factory.mktemp("set"))
    pairs = load_pairs("msrvtt", "train", files["data"], files["videos"])
    return pairs, Words(load_tokenizer(files["tokenizer"]), 12)


def test_batches_change_nothing(made: tuple[Pairs, Words]) -> None:
    pairs, words = made
    clips = EvaluationClips(pairs, FrameLoader(FrameRule(3, 8)))
    model = Standin().train()
    told: list[tuple[int, int]] = []
    found = evaluate(model, clips, words, batch_size=3, notify=lambda *x: told.append(x))
    assert model.training and model.sizes == [3, 3, 2] and told == [(3, 8), (6, 8), (8, 8)]
    assert found == evaluate(model, clips, words, batch_size=8)
    assert found["text_to_video"].queries == 16 and found["video_to_text"].queries == 8


def test_by_hand(made: tuple[Pairs, Words]) -> None:
    pairs, words = made
    model = Standin().eval()
    loader = FrameLoader(FrameRule(3, 8))
    from vidtok.data.retrieval import normalize

    clips = torch.cat([model.encode_video(normalize(f[None]), m[None]) for f, m in map(loader.load, pairs.clips)])
    texts = model.encode_text(*words(pairs.captions))
    expected = score(texts, clips, pairs.owner)
    found = evaluate(model, EvaluationClips(pairs, loader), words)
    assert {k: found[k] for k in expected} == expected


def test_clips_that_do_not_decode(made: tuple[Pairs, Words], tmp_path: Path) -> None:
    pairs, words = made
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    clips = list(pairs.clips)
    clips[2] = type(clips[2])("broken", bad)
    pairs = Pairs(tuple(clips), pairs.captions, pairs.owner)
    loader = FrameLoader(FrameRule(3, 8))
    with pytest.raises(VideoError, match="expected"):
        evaluate(Standin(), EvaluationClips(pairs, loader), words)
    found = evaluate(Standin(), EvaluationClips(pairs, loader, skip_unreadable=True), words)
    assert found["unreadable"] == ["broken"]
    assert found["text_to_video"].queries == 14 and found["video_to_text"].queries == 7
    # What merged is told of the clips that were read.
    tracer = Tracer()
    told = evaluate(tracer, EvaluationClips(pairs, loader, skip_unreadable=True), words, batch_size=3, sources=True)
    assert told["clips"] == [c.name for c in clips if c.name != "broken"] and told["sources"].dtype == torch.int16
    assert torch.equal(told["sources"], torch.cat(tracer.maps).view(8, 3, 4)[[0, 1, 3, 4, 5, 6, 7]])
    tracer.none = True
    assert "sources" not in evaluate(tracer, EvaluationClips(pairs, loader, True), words, sources=True)
    only = Pairs((clips[2],), ("a",), (0,))
    with pytest.raises(ValueError, match="a clip that decodes, got none out of 1"):
        evaluate(Standin(), EvaluationClips(only, loader, skip_unreadable=True), words)
