"""Folders that change as a whole: written beside their place and put there by renaming."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` at the end of the block, and what was there leaves.

    After an error or a kill ``folder`` is what it was. Two renames make the change; a kill between them leaves the old
    folder beside its place, where :func:`recover` finds it.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "model")
        >>> with whole(place) as new:
        ...     _ = (new / "weights").write_text("…")
        >>> [p.name for p in place.parent.iterdir()], [p.name for p in place.iterdir()]
        (['model'], ['weights'])
    """
    recover(folder)
    place, new, old = _places(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if place.exists():
            os.replace(place, old)
        os.replace(new, place)
    except BaseException:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | os.PathLike[str]) -> None:
    """Put back what a process killed inside :func:`whole` took away; does nothing where nothing is missing."""
    place, _, old = _places(folder)
    if old.is_dir() and not place.exists():
        os.replace(old, place)
    shutil.rmtree(old, ignore_errors=True)


def _places(folder: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    # Renaming must not replace a link to a folder elsewhere.
    place = Path(os.path.realpath(folder))
    return place, place.with_name(f".{place.name}.partial"), place.with_name(f".{place.name}.old")
