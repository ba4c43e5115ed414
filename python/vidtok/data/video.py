"""Video in: one reader over decord and PyAV, frames in chunks, optionally in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidtok.data import _decode, sampling
from vidtok.data._decode import VideoError

__all__ = ["Frames", "Limits", "Video", "VideoError", "VideoReader", "load_video", "resize_frames"]

_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Limits:
    """What one video may cost before it is refused.

    Args:
        seconds: wall-clock seconds for opening it, and for each chunk of frames (isolated readers).
        cpu_seconds: processor seconds of an isolated decoder altogether.
        pixels: width times height of one frame.
        frames: frames in the file.
        memory: bytes of address space of an isolated decoder.
    """

    seconds: float = 120.0
    cpu_seconds: float = 3600.0
    pixels: int = 1 << 26
    frames: int = 20_000_000
    memory: int = 8 << 30


class Frames(NamedTuple):
    """One chunk: uint8 ``[n, 3, H, W]`` frames, their numbers, and their times in seconds."""

    frames: Tensor
    numbers: list[int]
    timestamps: list[float]


def resize_frames(frames: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize uint8 ``[n, 3, H, W]`` to ``size`` = (height, width) by antialiased bicubic interpolation.

    It is the rule of the Hugging Face video processors (fixed-point uint8, half-pixel centres). Frames
    that have the size already are returned as they are.
    """
    if size is None or tuple(frames.shape[-2:]) == tuple(size):
        return frames
    return F.interpolate(frames, size=list(size), mode="bicubic", align_corners=False, antialias=True)


class _Isolated:
    """A decoder in a process of its own, with a deadline for every answer."""

    def __init__(self, path: str, backend: str, num_threads: int, limits: Limits) -> None:
        self._shown, self._limits = _decode.shown(path), limits
        environment = {k: v for k, v in os.environ.items() if k in _KEPT_ENVIRONMENT}
        self._process = subprocess.Popen(
            [sys.executable, _decode.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._out, self._fd = self._process.stdin, self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._fd, selectors.EVENT_READ)
        try:
            options = {"path": os.path.abspath(path), "backend": backend, "num_threads": num_threads}
            facts = self._ask({**options, "limits": asdict(limits)})
            self.name, self.num_frames = str(facts["name"]), int(facts["num_frames"])
            self.fps, self.width, self.height = float(facts["fps"]), int(facts["width"]), int(facts["height"])
            if not (0 < self.num_frames <= limits.frames and 0 < self.width * self.height <= limits.pixels):
                raise VideoError(f"expected a video within the limits, got {self._shown} beyond them")
            self.timestamps = np.frombuffer(self._receive(8 * self.num_frames), dtype="<f8")
        except BaseException:
            self.close()
            raise

    def _ask(self, message: Any) -> dict[str, Any]:
        self._deadline = time.monotonic() + self._limits.seconds
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except OSError:
            self._ended()
        (length,) = struct.unpack("<I", self._receive(4))
        if length > 1 << 20:
            self._ended()
        answer = json.loads(bytes(self._receive(length)))
        if "error" in answer:
            raise VideoError(str(answer["error"]))
        return answer

    def _receive(self, count: int) -> bytearray:
        data, view, have = bytearray(count), None, 0
        view = memoryview(data)
        while have < count:
            wait = self._deadline - time.monotonic()
            if wait <= 0 or not self._selector.select(wait):
                self.close()
                limit = self._limits.seconds
                raise VideoError(f"expected {self._shown} to decode within {limit:g} s, got no answer from the decoder")
            got = os.readv(self._fd, [view[have:]])
            if got == 0:
                self._ended()
            have += got
        return data

    def _ended(self) -> None:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else "ended early"
        raise _Crash(f"expected a video that decodes, got {self._shown}, on which the decoder {how}")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        answer = self._ask([int(i) for i in indices])
        if answer.get("count") != len(indices):
            self._ended()
        data = self._receive(len(indices) * self.height * self.width * 3)
        return np.frombuffer(data, dtype=np.uint8).reshape(len(indices), self.height, self.width, 3)

    def close(self) -> None:
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if process.poll() is None:
            process.kill()
        process.wait()
        self._selector.close()


class _Crash(VideoError):
    """The decoder died on the file."""


class VideoReader:
    """Reads frames of a local video file by number.

    ``num_frames``, ``fps`` (average, per second), ``width``, ``height``, ``timestamps`` (float64 ``[num_frames]``,
    seconds), ``duration`` (seconds, last frame included) and ``backend`` (the decoder in use) are known once open.

    Args:
        path: local file; anything else (a URL, a device, a playlist) is refused.
        backend: ``decord``, ``pyav``, or ``auto`` for decord with PyAV where decord is absent or fails.
        num_threads: decoding threads; 0 lets the decoder choose.
        isolate: decode in a child process with limits on time and memory, so that a crash, a hang or a
            decompression bomb costs this video and nothing else.
        limits: see :class:`Limits`.

    Raises:
        VideoError: (a ValueError) one sentence for a file that is missing, empty, truncated, audio only,
            beyond the limits or not a video.

    Example:
        >>> with VideoReader("clip.mp4") as video:  # doctest: +SKIP
        ...     for chunk in video.read(range(0, video.num_frames, 25), size=(252, 448)):
        ...         print(chunk.timestamps, chunk.frames.shape)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        num_threads: int = 0,
        isolate: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.path = Path(path)
        self._limits = limits or Limits()
        self._isolate, self._num_threads = isolate, int(num_threads)
        if self._num_threads < 0:
            raise ValueError(f"expected num_threads of at least 0, got {num_threads}")
        if backend not in _decode.BACKENDS:
            raise ValueError(f"expected a video backend among {', '.join(_decode.BACKENDS)}, got {backend!r}")
        _decode.check_file(str(path))
        self._fallback = backend == "auto"
        self._reader: Any = None
        try:
            self._reader = self._open(backend)
        except _Crash:
            if not self._fallback:
                raise
            self._reader = self._open("pyav")
        self.num_frames: int = self._reader.num_frames
        self.width: int = self._reader.width
        self.height: int = self._reader.height
        self.fps: float = self._reader.fps
        self.timestamps: np.ndarray = self._reader.timestamps

    def _open(self, backend: str) -> Any:
        if self._isolate:
            return _Isolated(str(self.path), backend, self._num_threads, self._limits)
        return _decode.open_backend(str(self.path), backend, self._num_threads, asdict(self._limits))

    @property
    def backend(self) -> str:
        """Name of the decoder in use."""
        return self._reader.name

    @property
    def duration(self) -> float:
        """Seconds from the first frame's beginning to the last one's end."""
        rate = self.fps if self.fps > 0 else 1.0
        return float(self.timestamps[-1] - self.timestamps[0]) + 1.0 / rate

    def _chunk(self, indices: list[int]) -> np.ndarray:
        try:
            return self._reader.read(indices)
        except Exception as error:
            if self.backend == "decord" and self._fallback:
                before = (self.num_frames, self.width, self.height)
                self._reader.close()
                with contextlib.suppress(VideoError):
                    self._reader = self._open("pyav")
                    if (self._reader.num_frames, self._reader.width, self._reader.height) == before:
                        return self._reader.read(indices)
            if isinstance(error, VideoError):
                raise
            text = f"expected frames {indices[0]} to {indices[-1]} of {_decode.shown(str(self.path))}"
            raise VideoError(f"{text}, got {type(error).__name__} from the decoder") from None

    def read(self, indices: Sequence[int], *, chunk: int = 16, size: tuple[int, int] | None = None) -> Iterator[Frames]:
        """Decode the frames ``indices`` a chunk at a time, resized as they come.

        Args:
            indices: frame numbers in any order; ascending ones decode fastest.
            chunk: frames held at once (fewer for very large frames).
            size: (height, width) to resize to, see :func:`resize_frames`.

        Yields:
            :class:`Frames`.

        Raises:
            IndexError: for a number outside the video.
            VideoError: when frames cannot be decoded.
        """
        numbers = [int(i) for i in indices]
        if chunk < 1:
            raise ValueError(f"expected chunk of at least 1 frame, got {chunk}")
        wrong = next((i for i in numbers if not 0 <= i < self.num_frames), None)
        if wrong is not None:
            raise IndexError(f"expected frame numbers from 0 to {self.num_frames - 1}, got {wrong}")
        if self._reader is None:
            raise ValueError("expected an open VideoReader, got a closed one")
        chunk = max(1, min(chunk, (1 << 27) // (self.width * self.height)))
        return self._stream(numbers, chunk, size)

    def _stream(self, numbers: list[int], chunk: int, size: tuple[int, int] | None) -> Iterator[Frames]:
        for start in range(0, len(numbers), chunk):
            part = numbers[start : start + chunk]
            frames = torch.from_numpy(self._chunk(part)).permute(0, 3, 1, 2)
            yield Frames(resize_frames(frames, size).contiguous(), part, [float(self.timestamps[i]) for i in part])

    def close(self) -> None:
        """Release the file and end the child process if there is one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


@dataclass(frozen=True)
class Video:
    """Sampled frames of one video.

    Args:
        frames: uint8 ``[T, 3, H, W]``.
        index: their numbers in the file.
        timestamps: their times in seconds.
        source_size: (height, width) before resizing.
        source_frames: frames in the file.
        source_fps: average frames per second of the file.
        backend: decoder that read them.
    """

    frames: Tensor
    index: list[int]
    timestamps: list[float]
    source_size: tuple[int, int]
    source_frames: int
    source_fps: float
    backend: str

    @property
    def sampled_fps(self) -> float:
        """Frames per second among the sampled ones."""
        spread = self.timestamps[-1] - self.timestamps[0]
        return (len(self.timestamps) - 1) / spread if len(self.timestamps) > 1 and spread > 0 else self.source_fps


def load_video(
    path: str | os.PathLike[str],
    *,
    rule: str = "linspace",
    count: int | None = 32,
    rate: float | None = None,
    size: Callable[[int, int, int], tuple[int, int]] | tuple[int, int] | None = None,
    chunk: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **reader: Any,
) -> Video:
    """Sample a video by a named rule; only the sampled, resized frames are held.

    Args:
        path: local video file.
        rule: ``linspace``, ``segment_centre`` or ``fps`` (:mod:`vidtok.data.sampling`).
        count: how many frames (an upper bound with ``fps``).
        rate: frames per second for ``fps``.
        size: (height, width), or a function of (frames, height, width) that gives it.
        chunk: frames decoded at once at full size.
        progress: called with (frames done, frames in all).
        reader: further arguments of :class:`VideoReader`.

    Raises:
        VideoError: when the file cannot be read.
    """
    with VideoReader(path, **reader) as video:
        stamps: Any = video.timestamps
        index = sampling.select(rule, stamps if rule == "fps" else range(video.num_frames), count=count, rate=rate)
        target = size(len(index), video.height, video.width) if callable(size) else size
        height, width = target or (video.height, video.width)
        frames = torch.empty(len(index), 3, height, width, dtype=torch.uint8)
        done = 0
        for part in video.read(index, chunk=chunk, size=target):
            frames[done : done + len(part.numbers)] = part.frames
            done += len(part.numbers)
            if progress is not None:
                progress(done, len(index))
        return Video(
            frames,
            index,
            [float(video.timestamps[i]) for i in index],
            (video.height, video.width),
            video.num_frames,
            video.fps,
            video.backend,
        )
