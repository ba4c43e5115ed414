"""A data set in MSR-VTT's layout, a tokenizer and a tiny model, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidtok.data.retrieval import train_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (230, 230, 230)}
PLACES = ("left", "right")


def write_clip(path: Path, colour: tuple[int, int, int], place: str, frames: int = 9) -> Path:
    """A bar of one colour at one side; its length tells the frame number."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 4
        for i in range(frames):
            picture = np.full((32, 48, 3), 20, dtype=np.uint8)
            side = slice(8, 22) if place == "left" else slice(26, 40)
            picture[: 8 + 2 * i, side] = colour
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


def msrvtt(root: Path, per: int = 2) -> dict[str, Path]:
    """8 clips, ``per`` captions each, train and test on the same."""
    videos = root / "videos"
    videos.mkdir(parents=True)
    sentences: list[dict[str, Any]] = []
    names, rows = [], []
    for i, (colour, place) in enumerate((c, p) for c in COLOURS for p in PLACES):
        name = f"video{i}"
        write_clip(videos / f"{name}.mp4", COLOURS[colour], place)
        texts = [f"a {colour} bar on the {place}", f"{colour} grows at the {place} side"][:per]
        sentences += [{"caption": t, "video_id": name, "sen_id": len(sentences)} for t in texts]
        names.append(name)
        rows.append(f"ret{i},msr{i},{name},{texts[0]}")
    data = root / "MSRVTT_data.json"
    data.write_text(json.dumps({"videos": [{"video_id": n} for n in names], "sentences": sentences}))
    (root / "MSRVTT_train.9k.csv").write_text("video_id\n" + "\n".join(names) + "\n")
    (root / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + "\n".join(rows) + "\n")
    tokenizer = train_tokenizer([s["caption"] for s in sentences], root / "tokenizer", 560)
    return {"root": root, "data": data, "videos": videos, "tokenizer": tokenizer}


def tiny_checkpoint(folder: Path, tokenizer: Path, **config: Any) -> Path:
    """A folder that ``--pretrained_clip_name`` takes, of random weights."""
    from vidtok.data.retrieval import load_tokenizer
    from vidtok.systems.stop import save, tiny

    words = load_tokenizer(tokenizer)
    model = tiny(32, 8, 32, 2, 2, context=16, vocabulary=560, text_width=32, text_heads=2, seed=0, **config)
    save(model, folder)
    words.save_pretrained(str(folder))
    return folder
