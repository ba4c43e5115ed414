"""Decoded frames kept on disk: one file per clip, appended to under a lock, oldest clips leaving first."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidtok._check import fail

_MAGIC = b"vidtokf1"
_HEAD = 16  # magic, then the length of the facts


class FrameCache:
    """Frames of clips as uint8 ``[3, S, S]``, by frame number.

    A clip's file is named by a hash of its path, its length, its modification time and how frames are made, by which
    decoder too, so a changed video or setting never meets old frames. Records carry checksums: torn or damaged ones
    count as absent. Several processes may read and write at once.

    Args:
        folder: made if absent.
        limit: bytes that all files together may take; the clips used longest ago leave when it is passed. Between
            two looks at the folder each process may add a sixteenth of it.

    Example:
        >>> import tempfile, numpy as np
        >>> cache = FrameCache(tempfile.mkdtemp(), limit=1 << 20)
        >>> cache.add("clip", {"frames": 9}, {4: np.zeros((3, 2, 2), np.uint8)})
        >>> facts, frames = cache.get("clip", [4, 5], 2)
        >>> facts, sorted(frames)
        ({'frames': 9}, [4])
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = 50 << 30) -> None:
        if limit < 1:
            fail("a cache limit of at least 1 byte", f"{limit}")
        self.folder, self.limit = Path(folder), int(limit)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._added = self.limit  # the first addition looks at the folder

    @staticmethod
    def key(path: str | os.PathLike[str], *rules: object) -> str:
        """Name of a clip's file; ``rules`` are whatever else decides its frames."""
        stat = os.stat(path)
        parts = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, *rules]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:40]

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.frames"

    def facts(self, key: str) -> dict[str, Any] | None:
        """What :meth:`add` was told of the clip, None when nothing is kept."""
        try:
            with self._path(key).open("rb") as file:
                return _facts(file)[0]
        except OSError:
            return None

    def get(self, key: str, numbers: Sequence[int], size: int) -> tuple[dict[str, Any] | None, dict[int, np.ndarray]]:
        """The clip's facts, and those of the frames ``numbers`` that are kept."""
        path = self._path(key)
        found: dict[int, np.ndarray] = {}
        wanted = set(numbers)
        try:
            with path.open("rb") as file:
                facts, start = _facts(file)
                if facts is None:
                    return None, {}
                record = _record(size)
                count = (os.fstat(file.fileno()).st_size - start) // record.itemsize
                for i in range(count):
                    at = start + i * record.itemsize
                    file.seek(at)
                    number = int(np.frombuffer(file.read(8), "<i8")[0])
                    if number not in wanted or number in found:
                        continue
                    file.seek(at)
                    row = np.frombuffer(file.read(record.itemsize), record)[0]
                    if int(row["check"]) == _check(number, row["frame"]):
                        found[number] = row["frame"]
            os.utime(path)
        except (OSError, ValueError, IndexError):
            # The file left, or is damaged: the frames are decoded again.
            return None, {}
        return facts, found

    def add(self, key: str, facts: Mapping[str, Any], frames: Mapping[int, np.ndarray]) -> None:
        """Keep ``frames`` (uint8 ``[3, S, S]`` by number) of a clip; a full or read-only disk is no error."""
        if not frames:
            return
        record = _record(next(iter(frames.values())).shape[-1])
        rows = np.zeros(len(frames), record)
        for row, (number, frame) in zip(rows, frames.items()):
            row["number"], row["frame"], row["check"] = number, frame, _check(number, frame)
        path = self._path(key)
        try:
            if not self._append(path, rows.tobytes(), record.itemsize):
                self._create(path, facts, rows.tobytes())
            self._added += rows.nbytes
            if self._added * 16 >= self.limit:
                self._trim()
        except OSError:
            return

    def _append(self, path: Path, data: bytes, size: int) -> bool:
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return False
        with file:
            _lock(file)
            facts, start = _facts(file)
            if facts is None:
                return False
            whole = (os.fstat(file.fileno()).st_size - start) // size
            # What a writer that died left half done is overwritten.
            file.truncate(start + whole * size)
            file.seek(start + whole * size)
            file.write(data)
        return True

    def _create(self, path: Path, facts: Mapping[str, Any], data: bytes) -> None:
        text = json.dumps(dict(facts)).encode()
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + len(text).to_bytes(8, "little") + text + data)
            # Others may read a cache that is shared; mkstemp gives files to their writer alone.
            os.chmod(name, 0o644)
            # Of two writers the later one's frames stay, whole.
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _trim(self) -> None:
        self._added = 0
        files = []
        for entry in os.scandir(self.folder):
            # Files that a writer which died never named count too.
            if entry.name.endswith(".frames") or entry.name.startswith(".new-"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= self.limit:
            return
        for _, size, path in sorted(files):
            if total <= self.limit * 0.9:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def size(self) -> int:
        """Bytes that the files take now."""
        return sum(p.stat().st_size for p in self.folder.glob("*.frames"))


def _record(size: int) -> np.dtype:
    return np.dtype([("number", "<i8"), ("check", "<u4"), ("frame", "u1", (3, size, size))])


def _check(number: int, frame: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(frame).tobytes(), number & 0xFFFFFFFF)


def _facts(file: Any) -> tuple[dict[str, Any] | None, int]:
    file.seek(0)
    head = file.read(_HEAD)
    length = int.from_bytes(head[8:], "little")
    if len(head) < _HEAD or head[:8] != _MAGIC or length > 1 << 26:
        return None, 0
    try:
        facts = json.loads(file.read(length))
    except ValueError:
        return None, 0
    return (facts, _HEAD + length) if isinstance(facts, dict) else (None, 0)


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX)
