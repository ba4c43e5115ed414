"""Annotation files and video folders, read so that a bad file costs one sentence."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vidtok._check import fail
from vidtok.data._decode import shown

EXTENSIONS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv")
_LARGEST = 2 << 30


def require(paths: Sequence[Path], what: str) -> None:
    """Refuse absent annotation files, all at once.

    Raises:
        FileNotFoundError: with the count and the names.
    """
    absent = [p for p in paths if not p.is_file()]
    if absent:
        names = ", ".join(shown(str(p)) for p in absent)
        text = f"{len(absent)} of {len(paths)} missing in {shown(str(absent[0].parent))}: {names}"
        fail(f"the annotation files of {what}", text, FileNotFoundError)


def read_text(path: Path) -> str:
    """A whole UTF-8 file."""
    require([path], "the data set")
    if path.stat().st_size > _LARGEST:
        fail(f"an annotation file of at most {_LARGEST} bytes", f"{shown(str(path))} of {path.stat().st_size}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail("an annotation file in UTF-8", f"{shown(str(path))} with byte {error.start} of another encoding")
    except OSError as error:
        fail("a readable annotation file", f"{shown(str(path))}: {error.strerror}")


def read_json(path: Path) -> Any:
    """A JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        fail("a JSON file", f"{shown(str(path))}, which is none from line {error.lineno} on ({error.msg})")
    except (RecursionError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith("expected"):
            raise
        fail("a JSON file", f"{shown(str(path))}, which nests too deep or holds too long a number")


def read_lines(path: Path) -> list[str]:
    """The lines of a file that hold something."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file whose first line names at least ``columns``."""
    try:
        # Lines end where the csv module says: str.splitlines also takes U+2028 and the like inside a caption for ends.
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = [{str(k): v for k, v in row.items() if isinstance(v, str)} for row in reader]
        header = reader.fieldnames or []
    except csv.Error as error:
        fail("a CSV file", f"{shown(str(path))}, which is none ({error})")
    absent = [c for c in columns if c not in header]
    if absent:
        fail(f"a CSV file with the columns {', '.join(columns)}", f"{shown(str(path))} without {', '.join(absent)}")
    for number, row in enumerate(rows, start=2):
        short = [c for c in columns if not row.get(c, "").strip()]
        if short:
            fail(f"a value for {short[0]} in every row", f"none in row {number} of {shown(str(path))}")
    return rows


class _Plain(pickle.Unpickler):
    """Loads containers, numbers and text; a pickle that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_pickle(path: Path) -> Any:
    """A pickle of plain containers, numbers and text; nothing in it is run."""
    require([path], "the data set")
    if path.stat().st_size > _LARGEST:
        fail(f"an annotation file of at most {_LARGEST} bytes", f"{shown(str(path))} of {path.stat().st_size}")
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="utf-8", errors="replace").load()
    except Exception as error:  # a damaged pickle raises almost anything
        said = "".join(c if c.isprintable() else "?" for c in str(error))[:80] or type(error).__name__
        fail("a pickle of plain containers and text", f"{shown(str(path))}, which is none ({said})")


def text_of(value: Any, what: str) -> str:
    """``value`` if it is text (bytes are decoded), with white space made single."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        fail(f"text for {what}", f"{type(value).__name__}")
    return " ".join(value.split())


class VideoFolder:
    """Finds the video file of a name, as annotations give it, below one folder.

    A name may come with or without extension, and the file may lie in a subfolder.

    Args:
        root: the folder.
        allow_outside: also take names that are absolute or lead out of the folder by ``..``.

    Raises:
        FileNotFoundError: when the folder is absent.
    """

    def __init__(self, root: str | os.PathLike[str], allow_outside: bool = False) -> None:
        self.root, self.allow_outside = Path(root), allow_outside
        if not self.root.is_dir():
            fail("a folder of videos", f"{shown(str(root))}, which is none", FileNotFoundError)
        self._index: dict[str, Path] | None = None

    def find(self, *names: str) -> Path | None:
        """The file of the first of ``names`` that has one, else None.

        Raises:
            ValueError: for a name that leaves the folder.
        """
        for name in names:
            self._check(name)
        for name in names:
            for candidate in self._candidates(name):
                path = self.root / candidate
                if path.is_file():
                    return path
        index = self._files()
        found = (index.get(n) or index.get(_stem(n)) for n in names)
        return next((path for path in found if path is not None), None)

    def _check(self, name: str) -> None:
        if not name or "\0" in name or len(name) > 1024:
            fail("the name of a video", f"{shown(name[:80])}")
        kinds = (PurePosixPath(name), PureWindowsPath(name))
        leaves = any(p.is_absolute() or p.drive or ".." in p.parts for p in kinds)
        if leaves and not self.allow_outside:
            short = "".join(c if c.isprintable() else "?" for c in repr(name[:80]))
            fail(
                f"the name of a video inside {shown(str(self.root))}",
                f"{short}, which leaves it (allow_outside takes it)",
            )

    @staticmethod
    def _candidates(name: str) -> list[str]:
        own = os.path.splitext(name)[1].lower() in EXTENSIONS
        if own:
            return [name, *(_stem(name) + e for e in EXTENSIONS), *(name + e for e in EXTENSIONS)]
        return [name + e for e in EXTENSIONS]

    def _files(self) -> dict[str, Path]:
        """Every video below the root, by name with and without extension; the first in order of paths wins."""
        if self._index is None:
            self._index = {}
            for folder, inner, names in os.walk(self.root):
                inner.sort()
                for name in sorted(names):
                    if os.path.splitext(name)[1].lower() in EXTENSIONS:
                        path = Path(folder, name)
                        for key in (name, _stem(name), _stem(_stem(name))):
                            self._index.setdefault(key, path)
        return self._index


def _stem(name: str) -> str:
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name
