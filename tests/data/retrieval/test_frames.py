"""Which frames are taken, how they are made, and that the cache changes nothing."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import write_video
from tests.data.retrieval.make import write_clip
from vidtok.data import VideoError, VideoReader
from vidtok.data.retrieval import Clip, FrameCache, FrameLoader, FrameRule, normalize, pick
from vidtok.data.retrieval import frames as module
from vidtok.data.retrieval.frames import MEAN, STD, crop_box


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip("v", write_clip(tmp_path_factory.mktemp("frames") / "v.mp4", (220, 30, 30), "left", 12))


@given(st.integers(1, 500), st.integers(1, 32), st.integers(0, 99))
def test_pick_takes_one_frame_of_each_segment(count: int, wanted: int, seed: int) -> None:
    for rng in (None, random.Random(seed)):
        chosen = pick(count, wanted, rng=rng)
        assert len(chosen) == min(count, wanted) == len(set(chosen)) and chosen == sorted(chosen)
        if count > wanted and rng is None:
            assert all(2 * wanted * i <= (2 * k + 1) * count < 2 * wanted * (i + 1) for k, i in enumerate(chosen))
        elif count > wanted:
            assert all(k * count // wanted <= i < (k + 1) * count // wanted for k, i in enumerate(chosen))


def test_the_shift_reaches_every_frame_of_a_segment() -> None:
    rng = random.Random(0)
    seen = Counter(pick(12, 3, rng=rng)[1] for _ in range(200))
    assert sorted(seen) == [4, 5, 6, 7] and min(seen.values()) > 25
    assert pick(12, 3) == [2, 6, 10] and pick(12, 3, "head", rng) == [0, 1, 2]
    assert pick(12, 3, "tail") == [9, 10, 11]
    with pytest.raises(ValueError, match="a position among head, tail, uniform"):
        pick(3, 1, "middle")


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (32, 32), (31, 57)])
def test_short_side_and_centre_crop(tmp_path: Path, height: int, width: int) -> None:
    path = write_video(tmp_path / "v.mkv", frames=3, size=(height + height % 2, width + width % 2))
    rule = FrameRule(1, 20)
    frames, mask = FrameLoader(rule).load(Clip("v", path))
    with VideoReader(path) as reader:
        source = next(reader.read([1])).frames[0]
    image = Image.fromarray(source.permute(1, 2, 0).numpy())
    short = min(image.size)
    image = image.resize((int(20 * image.width / short), int(20 * image.height / short)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 20) / 2), round((image.height - 20) / 2)
    expected = np.asarray(image.crop((left, top, left + 20, top + 20)))
    assert frames.shape == (1, 3, 20, 20) and frames.dtype == torch.uint8 and mask.tolist() == [1]
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_normalize_is_clips() -> None:
    frames = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    out = normalize(frames)
    for c in range(3):
        assert torch.allclose(out[:, c], (frames[:, c].double() / 255 - MEAN[c]).float() / STD[c], atol=1e-6)


def test_short_clips_are_filled_up(clip: Clip) -> None:
    frames, mask = FrameLoader(FrameRule(16, 16)).load(clip)
    assert mask.tolist() == [1] * 12 + [0] * 4
    assert torch.equal(frames[12], frames[11]) and torch.equal(frames[15], frames[11])
    assert not torch.equal(frames[10], frames[11])


def test_spans_rates_and_orders(clip: Clip) -> None:
    def numbers(rule: FrameRule, span: tuple[float, float] | None = None, seed: object = 0) -> list[int]:
        every = FrameLoader(FrameRule(12, 16)).load(clip)[0]
        found, mask = FrameLoader(rule).load(Clip("v", clip.path, span), seed)
        return [next(i for i in range(12) if torch.equal(every[i], f)) for f in found[: int(mask.sum())]]

    # 4 frames per second: second 1 to 2 is frames 4 to 8.
    assert numbers(FrameRule(12, 16), (1.0, 2.0)) == [4, 5, 6, 7, 8]
    assert numbers(FrameRule(12, 16), (7.0, 9.0)) == [11]
    assert numbers(FrameRule(12, 16, rate=1.0)) == [0, 4, 8]
    assert numbers(FrameRule(12, 16, rate=1.0), (1.0, 9.0)) == [4, 8]
    assert numbers(FrameRule(2, 16, order="reverse")) == [9, 3]
    shuffled = {tuple(numbers(FrameRule(3, 16, order="random"), seed=s)) for s in range(6)}
    assert len(shuffled) > 1 and {tuple(sorted(s)) for s in shuffled} == {(2, 6, 10)}
    assert len({tuple(numbers(FrameRule(3, 16, shift=True), seed=s)) for s in range(4)}) > 1


@pytest.mark.parametrize("rule", [FrameRule(3, 16), FrameRule(3, 16, shift=True), FrameRule(3, 16, rate=2.0)])
def test_the_cache_changes_nothing(
    clip: Clip, tmp_path: Path, rule: FrameRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cached = FrameLoader(rule), FrameLoader(rule, FrameCache(tmp_path / "cache"))
    opened: list[int] = []
    real = module.VideoReader
    monkeypatch.setattr(module, "VideoReader", lambda *a, **k: opened.append(1) or real(*a, **k))
    for seed in (1, 2, 3, 1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(plain.load(clip, seed), cached.load(clip, seed)))
    # Six by the plain loader; the cached one opens the file for what it has not met.
    assert 6 < len(opened) <= 9
    before = len(opened)
    cached.load(clip, 1)
    assert len(opened) == before


def test_a_process_of_its_own_changes_nothing(clip: Clip) -> None:
    rule = FrameRule(3, 16)
    assert torch.equal(FrameLoader(rule, isolate=True).load(clip)[0], FrameLoader(rule).load(clip)[0])


def test_a_changed_file_meets_no_old_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v.mp4", (220, 30, 30), "left")
    loader = FrameLoader(FrameRule(2, 16), FrameCache(tmp_path / "cache"))
    red = loader.load(Clip("v", path))[0]
    write_clip(path, (30, 30, 220), "left")
    os.utime(path, ns=(5, 5))
    blue = loader.load(Clip("v", path))[0]
    assert not torch.equal(red, blue) and torch.equal(blue, FrameLoader(FrameRule(2, 16)).load(Clip("v", path))[0])


def test_decoders_share_no_frames(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = module.VideoReader

    def reader(*args: object, backend: str, **options: object) -> VideoReader:
        opened.append(backend)
        # Where one of the decoders is absent, the other does for both.
        return real(*args, backend="auto", **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "VideoReader", reader)
    cache = FrameCache(tmp_path)

    def load(backend: str) -> bool:
        before = len(opened)
        FrameLoader(FrameRule(2, 16), cache, backend).load(clip)
        return len(opened) > before

    for there in (object(), None):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, there=there: there)
        # Without decord, auto is PyAV.
        assert [load(name) for name in ("auto", "pyav", "decord")] == [there is not None] * 3
        assert not any(load(name) for name in ("auto", "pyav", "decord"))


def test_what_does_not_decode(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video at all")
    for cache in (None, FrameCache(tmp_path / "cache")):
        with pytest.raises(VideoError, match=r"^expected "):
            FrameLoader(FrameRule(), cache).load(Clip("v", tmp_path / "v.mp4"))
        with pytest.raises(VideoError, match=r"^expected "):
            FrameLoader(FrameRule(), cache).load(Clip("v", tmp_path / "absent.mp4"))
    with pytest.raises(VideoError, match="at most 32 times as long as wide, got 100 x 2"):
        crop_box(2, 100, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": 0}, "count of at least 1 and at most 65536, got 0"),
        ({"size": -1}, "size of at least 1"),
        ({"order": "up"}, "order among"),
        ({"rate": float("nan")}, "a positive rate"),
    ],
)
def test_rules_are_checked(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FrameRule(**arguments)  # type: ignore[arg-type]
    rule = FrameRule(order="random", shift=True).evaluating()
    assert rule.order == "ordinary" and not rule.shift
