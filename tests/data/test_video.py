"""The reader: both decoders agree, chunks, times, limits, and files that are no video."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.conftest import rotate, write_video
from vidtok.data import Limits, VideoError, VideoReader, load_video, resize_frames
from vidtok.data import video as video_module

BOTH = pytest.mark.parametrize("backend", ["decord", "pyav"])


def read_all(path: Path, indices: list[int], **options: object) -> torch.Tensor:
    with VideoReader(path, **options) as reader:  # type: ignore[arg-type]
        return torch.cat([part.frames for part in reader.read(indices, chunk=5)])


def test_decoders_agree(clip: Path) -> None:
    order = [0, 3, 3, 23, 9, 8, 16, 1]
    one = read_all(clip, order, backend="decord")
    for options in ({"backend": "pyav"}, {"backend": "decord", "isolate": True}, {"backend": "pyav", "isolate": True}):
        assert torch.equal(one, read_all(clip, order, **options))
    assert one.shape == (8, 3, 64, 96) and one.dtype == torch.uint8
    assert not torch.equal(one[0], one[1]) and torch.equal(one[1], one[2])


def test_decoders_agree_on_a_camera_clip(bikes: Path) -> None:
    order = [*range(0, 250, 17), 249, 5]
    assert torch.equal(read_all(bikes, order, backend="decord"), read_all(bikes, order, backend="pyav", num_threads=1))


@BOTH
def test_frames_are_the_ones_asked(clip: Path, backend: str) -> None:
    frames = read_all(clip, list(range(24)), backend=backend).float()
    level = frames[:, :, 40:, :].mean((1, 2, 3))
    expected = torch.tensor([20.0 + 8 * i % 220 for i in range(24)])
    assert (level - expected).abs().max() < 3


@BOTH
def test_facts(clip: Path, backend: str) -> None:
    with VideoReader(clip, backend=backend) as reader:
        assert (reader.num_frames, reader.height, reader.width, reader.backend) == (24, 64, 96, backend)
        assert reader.fps == pytest.approx(8) and reader.duration == pytest.approx(3)
        assert reader.timestamps.tolist() == pytest.approx([i / 8 for i in range(24)])
        parts = list(reader.read([2, 5, 7], chunk=2))
    assert [p.numbers for p in parts] == [[2, 5], [7]] and parts[1].timestamps == pytest.approx([7 / 8])


@BOTH
def test_uneven_times_are_kept(tmp_path: Path, backend: str) -> None:
    stamps = [0, 100, 150, 400, 1000, 1100, 3000, 3050]
    path = write_video(tmp_path / "uneven.mkv", frames=8, stamps=stamps)
    with VideoReader(path, backend=backend) as reader:
        assert reader.timestamps.tolist() == pytest.approx([s / 1000 for s in stamps], abs=2e-3)
    video = load_video(path, rule="fps", rate=1.0, count=None, backend=backend)
    assert video.index == [0, 4, 5, 6]


@BOTH
@pytest.mark.parametrize("degrees", [90, 180])
def test_display_rotation(tmp_path: Path, backend: str, degrees: int) -> None:
    plain = write_video(tmp_path / "plain.mp4")
    before = read_all(plain, [4], backend=backend)[0]
    after = read_all(rotate(plain, degrees), [4], backend=backend)[0]
    turned = torch.rot90(before, -degrees // 90, (1, 2))
    assert after.shape == turned.shape and (after.int() - turned.int()).abs().float().mean() < 1.0


def test_resizing_is_torch_bicubic_in_chunks(clip: Path) -> None:
    whole = read_all(clip, list(range(10)))
    video = load_video(clip, count=24, size=(56, 84), chunk=3)
    expected = torch.nn.functional.interpolate(whole, size=[56, 84], mode="bicubic", antialias=True)
    assert torch.equal(video.frames[:10], expected) and video.frames.shape == (24, 3, 56, 84)
    assert resize_frames(whole, (64, 96)) is whole
    assert video.source_size == (64, 96) and video.sampled_fps == pytest.approx(8)


def test_a_long_video_does_not_sit_in_memory(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", frames=600, size=(96, 128), gop=50)
    with VideoReader(path, backend="pyav") as reader:
        tracemalloc.start()
        seen = sum(len(part.numbers) for part in reader.read(range(600), chunk=8))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seen == 600 and peak < 8 * 96 * 128 * 3 * 8


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    "what,words",
    [
        ("missing", "does not exist"),
        ("folder", "not a regular file"),
        ("empty", "empty"),
        ("text", "no video stream was found"),
        ("noise", "no video stream was found"),
        ("truncated", "truncated"),
        ("truncated with index", "truncated"),
        ("header only", "truncated"),
        ("playlist", "playlist"),
        ("audio", "only audio"),
        ("picture", "expected a"),
    ],
)
def test_files_that_are_no_video(bad_files: dict[str, Path], what: str, words: str, isolate: bool) -> None:
    for backend in ("auto", "pyav"):
        with pytest.raises(VideoError, match=words) as caught:
            VideoReader(bad_files[what], isolate=isolate, backend=backend)
        text = str(caught.value)
        assert text.startswith("expected ") and ", got " in text and "\n" not in text


def test_broken_frames_inside(tmp_path: Path) -> None:
    path = write_video(tmp_path / "hole.mp4", frames=60, codec="libx264", gop=60)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at + 2000 : at + (len(data) - at) // 2] = bytes((len(data) - at) // 2 - 2000)
    path.write_bytes(bytes(data))
    for isolate in (False, True):
        try:
            got = read_all(path, list(range(0, 60, 7)), isolate=isolate)
        except VideoError as error:
            assert "expected" in str(error) and "\n" not in str(error)
        else:
            assert got.shape == (9, 3, 64, 96)


def test_limits(clip: Path) -> None:
    for isolate in (False, True):
        with pytest.raises(VideoError, match="at most 100 pixels"):
            VideoReader(clip, isolate=isolate, limits=Limits(pixels=100))
        with pytest.raises(VideoError, match="above the limit of 5"):
            VideoReader(clip, isolate=isolate, limits=Limits(frames=5))


@pytest.fixture
def hostile_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Replace the worker script by one that answers nothing but runs ``body``."""

    def install(body: str) -> None:
        script = tmp_path / "worker.py"
        script.write_text("import os, sys, time, json, struct, signal\nsys.stdin.buffer.readline()\n" + body)
        monkeypatch.setattr(video_module._decode, "__file__", str(script))

    return install


def test_a_hanging_decoder_is_ended(clip: Path, hostile_worker) -> None:  # type: ignore[no-untyped-def]
    hostile_worker("time.sleep(60)")
    with pytest.raises(VideoError, match=r"within 0\.5 s"):
        VideoReader(clip, isolate=True, limits=Limits(seconds=0.5))


def test_a_crashing_decoder_costs_only_the_video(clip: Path, hostile_worker) -> None:  # type: ignore[no-untyped-def]
    hostile_worker("os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(VideoError, match="SIGSEGV"):
        VideoReader(clip, isolate=True)


def test_a_lying_decoder_is_not_believed(clip: Path, hostile_worker) -> None:  # type: ignore[no-untyped-def]
    facts = {"name": "decord", "num_frames": 1 << 40, "fps": 1.0, "width": 8, "height": 8}
    hostile_worker(f"b=json.dumps({facts!r}).encode(); sys.stdout.buffer.write(struct.pack('<I', len(b)) + b)")
    with pytest.raises(VideoError, match="beyond them"):
        VideoReader(clip, isolate=True)


def test_a_bomb_meets_the_memory_limit(tmp_path: Path) -> None:
    path = write_video(tmp_path / "large.mp4", frames=2, size=(2160, 3840))
    with pytest.raises(VideoError):
        read_all(path, [0, 1], isolate=True, limits=Limits(memory=200 << 20))


def test_no_child_is_left(clip: Path) -> None:
    reader = VideoReader(clip, isolate=True)
    child = reader._reader._process.pid
    reader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, signal.SIGCONT)


def test_pyav_serves_when_decord_fails(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise RuntimeError("no")

    monkeypatch.setitem(video_module._decode._MAKERS, "decord", Broken)
    with VideoReader(clip) as reader:
        assert reader.backend == "pyav"
    with pytest.raises(VideoError):
        VideoReader(clip, backend="decord")


def test_pyav_serves_when_decord_fails_later(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(clip, [1, 2], backend="pyav")

    def broken(*_: object) -> np.ndarray:
        raise RuntimeError("no")

    monkeypatch.setattr(video_module._decode.DecordBackend, "read", broken)
    with VideoReader(clip) as reader:
        assert reader.backend == "decord"
        assert torch.equal(next(reader.read([1, 2])).frames, expected) and reader.backend == "pyav"
    with VideoReader(clip, backend="decord") as reader, pytest.raises(VideoError, match="RuntimeError"):
        next(reader.read([1, 2]))


def test_without_either_package(clip: Path, tmp_path: Path) -> None:
    for name in ("decord", "av"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('absent')\n")
    code = f"""
    from vidtok.data import VideoReader, VideoError
    for isolate in (False, True):
        try:
            VideoReader({str(clip)!r}, isolate=isolate)
        except VideoError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("expected the package decord or pyav") == 2


def test_arguments(clip: Path) -> None:
    with pytest.raises(ValueError, match="backend among"):
        VideoReader(clip, backend="opencv")
    with pytest.raises(ValueError, match="num_threads"):
        VideoReader(clip, num_threads=-1)
    reader = VideoReader(clip)
    with pytest.raises(IndexError, match="from 0 to 23, got 24"):
        reader.read([0, 24])
    with pytest.raises(ValueError, match="chunk"):
        reader.read([0], chunk=0)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read([0])


@pytest.mark.parametrize("seed", range(6))
def test_damaged_bytes_end_in_frames_or_one_sentence(clip: Path, tmp_path: Path, seed: int) -> None:
    """Whatever a file holds, an isolated reader gives frames of the promised shape or a VideoError."""
    random = np.random.default_rng(seed)
    data = bytearray(clip.read_bytes())
    for at in random.integers(0, len(data), 4 ** (seed % 3 + 1)):
        data[at] = random.integers(256)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(data))
    try:
        with VideoReader(path, isolate=True, limits=Limits(seconds=20, frames=10_000)) as reader:
            numbers = list(range(0, reader.num_frames, 5))
            for part in reader.read(numbers):
                assert part.frames.shape[1:] == (3, reader.height, reader.width)
    except VideoError as error:
        assert "expected " in str(error) and "\n" not in str(error)
