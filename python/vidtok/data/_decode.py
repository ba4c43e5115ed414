"""Decoding backends without torch, and the worker that runs them in a process of its own.

This file is also executed as a script by :class:`vidtok.data.video.VideoReader` (``isolate=True``),
so it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Protocol

BACKENDS = ("auto", "decord", "pyav")
_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")


class VideoError(ValueError):
    """A video file that cannot be read; the message is one sentence."""


class Backend(Protocol):
    """What a decoder offers: facts about the stream, and frames by number."""

    name: str
    num_frames: int
    fps: float
    width: int
    height: int
    timestamps: Any

    def read(self, indices: Sequence[int]) -> Any:
        """uint8 ``[n, H, W, 3]`` frames in the order asked."""

    def close(self) -> None:
        """Release the file."""


def shown(path: str) -> str:
    """The file's name as it appears in messages, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in repr(os.path.basename(path) or path))


def check_file(path: str) -> None:
    """Refuse what is visibly not a whole local video file, without starting a decoder.

    Raises:
        VideoError: for a missing, empty, truncated (ISO media) or playlist file.
    """
    name = shown(path)
    if not os.path.exists(path):
        raise VideoError(f"expected a video file, got {name}, which does not exist")
    if not os.path.isfile(path):
        raise VideoError(f"expected a video file, got {name}, which is not a regular file")
    size = os.path.getsize(path)
    if size == 0:
        raise VideoError(f"expected a video file, got {name}, which is empty (0 bytes)")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            # Playlists make a demuxer open other files.
            if head.startswith((b"#EXTM3U", b"ffconcat", b"<MPD", b"<?xml")):
                raise VideoError(f"expected a video file, got {name}, which is a playlist")
            if head[4:8] in _ISO_BOXES:
                _check_iso(file, size, name)
    except OSError as error:
        raise VideoError(f"expected a readable video file, got {name}: {error.strerror}") from None


def _check_iso(file: BinaryIO, size: int, name: str) -> None:
    """Every top-level box of an MP4 or MOV file must end inside the file, and one must be ``moov``."""
    position = 0
    kinds: set[bytes] = set()
    while position + 8 <= size and len(kinds) < 64:
        file.seek(position)
        header = file.read(16)
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - position
        if length < 8:
            break
        kinds.add(kind)
        if position + length > size:
            text = f"which is truncated: its {kind.decode('latin-1')!r} part ends at byte {position + length} of {size}"
            raise VideoError(f"expected a whole video file, got {name}, {text}")
        position += length
    if b"moov" not in kinds:
        raise VideoError(f"expected a whole video file, got {name}, which has no index ('moov') and is truncated")


def _check_limits(backend: Backend, limits: dict[str, float], name: str) -> None:
    pixels = backend.width * backend.height
    if not 0 < pixels <= limits["pixels"]:
        raise VideoError(
            f"expected frames of at most {int(limits['pixels'])} pixels, "
            f"got {name} with {backend.width} x {backend.height}"
        )
    if not 0 < backend.num_frames <= limits["frames"]:
        count = backend.num_frames
        what = "no video frames" if count == 0 else f"{count} frames, above the limit of {int(limits['frames'])}"
        raise VideoError(f"expected a video with frames, got {name} with {what}")


class DecordBackend:
    """Frames through decord."""

    name = "decord"

    def __init__(self, path: str, num_threads: int) -> None:
        import decord
        import numpy as np

        decord.logging.set_level(decord.logging.FATAL)
        self._reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=num_threads)
        self.num_frames = len(self._reader)
        if self.num_frames == 0:
            raise VideoError(f"expected a video with frames, got {shown(path)} with no video frames")
        # Taken in slices: decord builds a Python list inside.
        slices = range(0, self.num_frames, 65536)
        stamps = [self._reader.get_frame_timestamp(np.arange(a, min(a + 65536, self.num_frames)))[:, 0] for a in slices]
        self.timestamps = np.concatenate(stamps).astype(np.float64)
        self.fps = float(self._reader.get_avg_fps())
        self.height, self.width = (int(v) for v in self._reader[0].shape[:2])

    def read(self, indices: Sequence[int]) -> Any:
        return self._reader.get_batch(list(indices)).asnumpy()

    def close(self) -> None:
        self._reader = None


class AVBackend:
    """Frames through PyAV: packet times first, then seeks to key frames."""

    name = "pyav"

    def __init__(self, path: str, num_threads: int) -> None:
        import av
        import numpy as np

        self._av, self._path = av, path
        name = shown(path)
        self._container = av.open(path, metadata_errors="ignore")
        streams = [s for s in self._container.streams.video if not _is_cover(av, s)]
        if not streams:
            kind = "only audio" if self._container.streams.audio else "no video stream"
            raise VideoError(f"expected a file with a video stream, got {name} with {kind}")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        if num_threads > 0:
            self._stream.codec_context.thread_count = num_threads
        times, keys = [], []
        for packet in self._container.demux(self._stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0 or stamp is None or packet.is_discard:
                continue
            times.append(stamp)
            if packet.is_keyframe:
                keys.append(stamp)
        self._times, self._keys = sorted(set(times)), sorted(set(keys))
        self.num_frames = len(self._times)
        announced = int(self._stream.frames or 0)
        if self.num_frames < announced * 0.98 - 1:
            text = f"which is truncated: {self.num_frames} of {announced} frames are there"
            raise VideoError(f"expected a whole video file, got {name}, {text}")
        if self.num_frames == 0:
            raise VideoError(f"expected a video with frames, got {name} with no video frames")
        base = float(self._stream.time_base or 0) or 1.0
        self.timestamps = np.asarray(self._times, dtype=np.float64) * base
        spread = self.timestamps[-1] - self.timestamps[0]
        rate = self._stream.average_rate
        self.fps = float(rate) if rate else ((self.num_frames - 1) / spread if spread > 0 else 1.0)
        self._frames: Any = None
        self._position = -1
        self._last: tuple[int, Any] | None = None
        first = self._frame(0)
        self.height, self.width = (int(v) for v in first.shape[:2])

    def _seek(self, index: int) -> None:
        from bisect import bisect_right

        key = self._keys[max(0, bisect_right(self._keys, self._times[index]) - 1)] if self._keys else self._times[0]
        self._container.seek(int(key), stream=self._stream, backward=True)
        self._frames = self._container.decode(self._stream)
        self._position = bisect_right(self._times, key) - 2

    def _frame(self, index: int) -> Any:
        from bisect import bisect_right

        if self._last is not None and self._last[0] == index:
            return self._last[1]
        target = self._times[index]
        key = bisect_right(self._keys, target) - 1
        jump = key >= 0 and self._keys[key] > (self._times[self._position] if self._position >= 0 else -(1 << 62))
        if self._frames is None or index <= self._position or jump:
            self._seek(index)
        for frame in self._frames:
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None:
                continue
            self._position = bisect_right(self._times, stamp) - 1
            if stamp >= target:
                array = frame.to_ndarray(format="rgb24")
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                if turns:
                    import numpy as np

                    array = np.ascontiguousarray(np.rot90(array, turns))
                self._last = (index, array)
                return array
        raise VideoError(f"expected frame {index} of {self.num_frames} in {shown(self._path)}, got the end of the data")

    def read(self, indices: Sequence[int]) -> Any:
        import numpy as np

        out = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            try:
                frame = self._frame(index)
            except self._av.FFmpegError as error:
                text = f"expected frame {index} of {self.num_frames} in {shown(self._path)}"
                raise VideoError(f"{text}, got {type(error).__name__} from the decoder") from None
            if frame.shape != out.shape[1:]:
                raise VideoError(
                    f"expected frames of one size, {self.width} x {self.height}, in {shown(self._path)}, "
                    f"got {frame.shape[1]} x {frame.shape[0]} at frame {index}"
                )
            out[row] = frame
        return out

    def close(self) -> None:
        self._container.close()


def _is_cover(av: Any, stream: Any) -> bool:
    """Whether a video stream is the still cover picture of an audio file."""
    try:
        return bool(stream.disposition & av.stream.Disposition.attached_pic)
    except AttributeError:
        return False


_MAKERS: dict[str, Callable[[str, int], Backend]] = {"decord": DecordBackend, "pyav": AVBackend}


def open_backend(path: str, backend: str, num_threads: int, limits: dict[str, float]) -> Backend:
    """Open a file with the named backend, or with the first that can.

    Raises:
        VideoError: in one sentence, when no backend can open it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected a video backend among {', '.join(BACKENDS)}, got {backend!r}")
    check_file(path)
    path = os.path.abspath(path)
    absent, reason = [], None
    for name in ("decord", "pyav") if backend == "auto" else (backend,):
        try:
            reader = _MAKERS[name](path, num_threads)
        except ImportError:
            absent.append(name)
            continue
        except VideoError as error:
            reason = error
            continue
        except MemoryError:
            reason = VideoError(f"expected a video that decodes within the memory limit, got {shown(path)}")
            continue
        except Exception:  # decoders raise their own classes for what a file holds
            reason = reason or VideoError(
                f"expected a readable video file, got {shown(path)}, in which no video stream was found"
            )
            continue
        _check_limits(reader, limits, shown(path))
        return reader
    if reason is not None:
        raise reason
    raise VideoError(f"expected the package {' or '.join(absent)} to read {shown(path)}, got neither installed")


def _send(out: BinaryIO, message: dict[str, Any], *payloads: Any) -> None:
    head = json.dumps(message).encode()
    out.write(struct.pack("<I", len(head)) + head)
    for payload in payloads:
        out.write(payload)
    out.flush()


def _confine(limits: dict[str, float]) -> None:
    """Take from this process what a decoder does not need."""
    try:
        import resource
    except ImportError:
        return
    wanted = {
        "RLIMIT_AS": int(limits["memory"]),
        "RLIMIT_CPU": int(limits["cpu_seconds"]),
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            low = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (low, hard))


def serve(requests: Iterable[bytes], out: BinaryIO) -> None:
    """Answer JSON lines on ``requests``: first how to open, then lists of frame numbers."""
    lines = iter(requests)
    options = json.loads(next(lines))
    _confine(options["limits"])
    try:
        reader = open_backend(options["path"], options["backend"], options["num_threads"], options["limits"])
    except ValueError as error:
        _send(out, {"error": str(error)})
        return
    facts = {k: getattr(reader, k) for k in ("name", "num_frames", "fps", "width", "height")}
    _send(out, facts, reader.timestamps.astype("<f8").tobytes())
    for line in lines:
        indices = json.loads(line)
        try:
            frames = reader.read(indices)
            if frames.shape != (len(indices), reader.height, reader.width, 3):
                raise VideoError(f"expected frames of one size in {shown(options['path'])}, got another")
        except VideoError as error:
            _send(out, {"error": str(error)})
        except Exception as error:
            name, kind = shown(options["path"]), type(error).__name__
            _send(
                out, {"error": f"expected frames {indices[0]} to {indices[-1]} of {name}, got {kind} from the decoder"}
            )
        else:
            _send(out, {"count": len(indices)}, memoryview(frames).cast("B"))


if __name__ == "__main__":
    # The folder of this file must not shadow other modules.
    sys.path.pop(0)
    # Decoders print to file descriptor 1, which carries the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
