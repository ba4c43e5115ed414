"""What the annotation files of the retrieval data sets say: captions per video, in the order of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidtok._check import fail
from vidtok.data._decode import shown
from vidtok.data.retrieval._files import read_csv, read_json, read_lines, read_pickle, read_text, require, text_of

SPLITS = ("train", "val", "test")


@dataclass
class Annotations:
    """Captions by video, and where in its file a video begins and ends.

    Args:
        captions: texts of each video.
        spans: (start, end) in seconds, of videos that are parts of their file.
        names: further names that a video's file may have.
    """

    captions: dict[str, list[str]] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def msrvtt(split: str, data: Path, table: Path | None = None) -> Annotations:
    """MSR-VTT: ``MSRVTT_data.json``, with the split in a CSV file.

    ``{"videos": [{"video_id", …}], "sentences": [{"video_id", "caption", …}]}``; for training the table has a column
    ``video_id`` (``MSRVTT_train.9k.csv``, ``MSRVTT_train.7k.csv``) and captions come from the JSON file; for testing it
    also has ``sentence`` (``MSRVTT_JSFUSION_test.csv``, 1k-A), or captions come from the JSON file too.

    Args:
        split: ``train``, ``val`` or ``test``.
        data: the JSON file, or the folder that holds it.
        table: the CSV file; beside ``data`` by default.
    """
    file = data / "MSRVTT_data.json" if data.is_dir() else data
    default = "MSRVTT_train.9k.csv" if split == "train" else "MSRVTT_JSFUSION_test.csv"
    table = table if table is not None else file.parent / default
    require([table], "MSR-VTT")
    rows = read_csv(table, ["video_id"])
    out = Annotations()
    if split != "train" and rows and "sentence" in rows[0]:
        for row in rows:
            out.captions.setdefault(row["video_id"].strip(), []).append(text_of(row.get("sentence", ""), "a sentence"))
        return out
    require([file], "MSR-VTT")
    wanted = {row["video_id"].strip(): [] for row in rows}  # type: dict[str, list[str]]
    for entry in _list(_get(read_json(file), "sentences", file), "sentences", file):
        video = text_of(_get(entry, "video_id", file), "video_id")
        if video in wanted:
            wanted[video].append(text_of(_get(entry, "caption", file), "caption"))
    out.captions.update(wanted)
    return out


def msvd(split: str, data: Path, table: Path | None = None) -> Annotations:
    """MSVD: ``train_list.txt``, ``val_list.txt``, ``test_list.txt`` and ``raw-captions.pkl`` in one folder.

    The pickle maps a video to lists of words; it is read without running anything in it. Every video has several
    captions, in testing too.
    """
    folder = _folder(data)
    files = [table or folder / f"{split}_list.txt", folder / "raw-captions.pkl"]
    require(files, "MSVD")
    known = _dict(read_pickle(files[1]), "a mapping of videos to captions", files[1])
    known = {text_of(k, "the name of a video"): v for k, v in known.items()}
    out = Annotations()
    for video in read_lines(files[0]):
        # A video without captions is not one of the data set; it is named as such.
        texts = _list(known.get(video, []), f"captions of {shown(video)}", files[1])
        words = [
            [text_of(w, "a word") for w in t] if isinstance(t, list | tuple) else [text_of(t, "a caption")]
            for t in texts
        ]
        out.captions[video] = [" ".join(w) for w in words]
    return out


def didemo(split: str, data: Path, table: Path | None = None) -> Annotations:
    """DiDeMo: ``train_list.txt`` and ``train_data.json`` (likewise ``val``, ``test``) in one folder.

    ``[{"video", "description", "times", …}]``; the descriptions of a video are joined to one paragraph, and of its file
    the first 31 s are taken.
    """
    folder = _folder(data)
    files = [table or folder / f"{split}_list.txt", folder / f"{split}_data.json"]
    require(files, "DiDeMo")
    parts: dict[str, list[str]] = {}
    for entry in _list(read_json(files[1]), "descriptions", files[1]):
        video = text_of(_get(entry, "video", files[1]), "video")
        parts.setdefault(_plain(video), []).append(text_of(_get(entry, "description", files[1]), "description"))
    out = Annotations()
    for video in read_lines(files[0]):
        texts = parts.get(_plain(video), [])
        out.captions[video] = [" ".join(texts)] if texts else []
        out.spans[video] = (0.0, 31.0)
    return out


def lsmdc(split: str, data: Path, table: Path | None = None) -> Annotations:
    """LSMDC: ``LSMDC16_annos_training.csv``, ``LSMDC16_annos_val.csv``, ``LSMDC16_challenge_1000_publictect.csv``.

    Lines of six fields with tabs between them: clip, start and end aligned, start and end extracted, sentence. The clip
    ``0017_Pianist_00.23.28.872-00.23.34.843`` is left out, as is usual: its published file does not decode.
    """
    names = {"train": "LSMDC16_annos_training.csv", "val": "LSMDC16_annos_val.csv"}
    file = table or _folder(data) / names.get(split, "LSMDC16_challenge_1000_publictect.csv")
    require([file], "LSMDC")
    out = Annotations()
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", 5)
        if len(fields) != 6:
            fail(
                "six fields with tabs between them in every line",
                f"{len(fields)} in line {number} of {shown(str(file))}",
            )
        clip = fields[0].strip()
        if clip == "0017_Pianist_00.23.28.872-00.23.34.843":
            continue
        out.captions.setdefault(clip, []).append(text_of(fields[5], "a sentence"))
    return out


def activitynet(split: str, data: Path, table: Path | None = None) -> Annotations:
    """ActivityNet Captions: ``train.json`` and ``train_ids.json``, or ``val_1.json`` and ``val_ids.json``.

    ``{"v_…": {"duration", "timestamps", "sentences"}}``; the sentences of a video are joined to one paragraph. Files
    may be named with or without ``v_``. Testing is on ``val_1``, as is usual.
    """
    folder = _folder(data)
    name, ids = ("train", "train_ids.json") if split == "train" else ("val_1", "val_ids.json")
    files = [table or folder / ids, folder / f"{name}.json"]
    require(files, "ActivityNet")
    known = _dict(read_json(files[1]), "a mapping of videos to sentences", files[1])
    out = Annotations()
    for entry in _list(read_json(files[0]), "names of videos", files[0]):
        video = text_of(entry, "the name of a video")
        bare = video.removeprefix("v_")
        found = known.get(video, known.get(f"v_{bare}"))
        out.names[video] = (bare, f"v_{bare}")
        out.captions[video] = []
        if found is not None:
            sentences = _list(_get(found, "sentences", files[1]), "sentences", files[1])
            out.captions[video] = [" ".join(text_of(s, "a sentence") for s in sentences)]
            duration = found.get("duration")
            if isinstance(duration, int | float) and not isinstance(duration, bool) and 0 < duration < 1e7:
                out.spans[video] = (0.0, float(duration))
    return out


Reader = Callable[[str, Path, Path | None], Annotations]

#: Readers by the name that ``--datatype`` takes.
READERS: Mapping[str, Reader] = {
    "msrvtt": msrvtt,
    "msvd": msvd,
    "didemo": didemo,
    "lsmdc": lsmdc,
    "activitynet": activitynet,
}


def _plain(video: str) -> str:
    """DiDeMo's lists and descriptions name the same video with different extensions."""
    return video.split(".", 1)[0]


def _get(value: Any, key: str, file: Path) -> Any:
    if not isinstance(value, dict) or key not in value:
        fail(
            f"entries with {key!r} in {shown(str(file))}",
            "one without" if isinstance(value, dict) else type(value).__name__,
        )
    return value[key]


def _list(value: Any, what: str, file: Path) -> list[Any]:
    if not isinstance(value, list | tuple):
        fail(f"a list of {what} in {shown(str(file))}", type(value).__name__)
    return list(value)


def _dict(value: Any, what: str, file: Path) -> dict[Any, Any]:
    if not isinstance(value, dict):
        fail(f"{what} in {shown(str(file))}", type(value).__name__)
    return value
