"""A retrieval data set: clips that are there, and the captions of each."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

from vidtok._check import fail
from vidtok.data._decode import shown
from vidtok.data.retrieval._files import VideoFolder
from vidtok.data.retrieval.annotations import READERS, SPLITS


@dataclass(frozen=True)
class Clip:
    """A video file, or its part between two times in seconds."""

    name: str
    path: Path
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pairs:
    """Clips and captions; caption ``i`` is about clip ``owner[i]``.

    Args:
        clips: in the order of the annotation file.
        captions: texts, those of one clip one behind another.
        owner: number of each caption's clip, ascending.
        missing: names of the videos that were not found and are left out.
        blank: videos left out because no caption names them.

    Example:
        >>> pairs = Pairs((Clip("a", Path("a.mp4")),), ("a cat", "a pet"), (0, 0))
        >>> len(pairs), pairs.of(0)
        (2, [0, 1])
    """

    clips: tuple[Clip, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    missing: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def of(self, clip: int) -> list[int]:
        """Numbers of the captions of one clip."""
        return list(range(bisect_left(self.owner, clip), bisect_right(self.owner, clip)))


def load_pairs(
    datatype: str,
    split: str,
    data_path: str | os.PathLike[str],
    features_path: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    allow_missing: bool = False,
    allow_outside: bool = False,
) -> Pairs:
    """Read a retrieval data set in its published layout (:mod:`vidtok.data.retrieval.annotations`).

    Args:
        datatype: ``msrvtt``, ``msvd``, ``didemo``, ``lsmdc`` or ``activitynet``.
        split: ``train``, ``val`` or ``test``.
        data_path: folder of the annotation files (MSR-VTT: its JSON file).
        features_path: folder of the videos.
        table: file that lists the split, when it is not beside the others under its published name.
        allow_missing: leave out videos that are not there, with a warning that counts them.
        allow_outside: take names in annotations that lead out of ``features_path``.

    Raises:
        FileNotFoundError: for absent annotation files or videos, named and counted.
        ValueError: for a malformed file, an unknown data set, or a set without a single pair.
    """
    if datatype not in READERS:
        fail(f"a datatype among {', '.join(READERS)}", repr(datatype))
    if split not in SPLITS:
        fail(f"a split among {', '.join(SPLITS)}", repr(split))
    said = READERS[datatype](split, Path(data_path), None if table is None else Path(table))
    folder = VideoFolder(features_path, allow_outside)
    clips: list[Clip] = []
    captions: list[str] = []
    owner: list[int] = []
    missing: list[str] = []
    blank: list[str] = []
    for name, texts in said.captions.items():
        texts = [t for t in texts if t]
        if not texts:
            blank.append(name)
            continue
        path = folder.find(name, *said.names.get(name, ()))
        if path is None:
            missing.append(name)
            continue
        owner.extend([len(clips)] * len(texts))
        captions.extend(texts)
        clips.append(Clip(name, path, said.spans.get(name)))
    _report(missing, len(said.captions) - len(blank), folder.root, allow_missing)
    if blank:
        warnings.warn(f"{counted(len(blank), 'video')} left out for want of captions: {_few(blank)}", stacklevel=2)
    if not captions:
        fail(f"captioned videos in the {split} split of {datatype}", "none")
    return Pairs(tuple(clips), tuple(captions), tuple(owner), tuple(missing), tuple(blank))


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _report(missing: list[str], count: int, root: Path, allowed: bool) -> None:
    if not missing:
        return
    text = f"{len(missing)} of {count} videos missing in {shown(str(root))}: {_few(missing)}"
    if not allowed:
        fail("every annotated video", f"{text} (allow_missing goes on without them)", FileNotFoundError)
    warnings.warn(text, stacklevel=3)


def _few(names: list[str]) -> str:
    return ", ".join(shown(n)[1:-1] for n in names[:10]) + (", …" if len(names) > 10 else "")
