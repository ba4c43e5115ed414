"""What token merging costs and saves in retrieval: R@k, time and memory on the small set of ``examples/retrieval``.

``python -m bench.retrieval --set FOLDER --model FOLDER`` writes bench/results/retrieval.csv and fills the README.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch

import vidtok
from bench.accuracy.ways import divert
from bench.memory import _forget_peak, _status_mib
from bench.row import RESULTS, ROOT, commit, cpu_name

CSV = RESULTS / "retrieval.csv"
MARKS = ("<!-- retrieval:begin -->", "<!-- retrieval:end -->")
WAYS = {
    "tome": "ToMe",
    "tome-plain": "ToMe, no proportional attention",
    "uniform": "uniform dropping",
    "random": "random dropping",
}


@dataclass(frozen=True)
class Line:
    """One way at one r; recalls in %, time of a video in ms, peak of a training step beyond the model in MiB."""

    way: str
    r: int
    tokens: str
    t2v_r1: float
    t2v_r5: float
    t2v_r10: float
    v2t_r1: float
    v2t_r5: float
    v2t_r10: float
    draws: int
    ms: float
    mib: float
    videos: int
    model: str = ""
    machine: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""


def write(lines: list[Line], path: Path = CSV) -> None:
    """Replace the file by these lines."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Line)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def read(path: Path = CSV) -> list[Line]:
    """Lines of a file that :func:`write` made."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Line)}
    with path.open(newline="") as file:
        return [Line(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


@contextmanager
def reduced(model: Any, way: str, r: int, seed: int = 0) -> Iterator[None]:
    """The model with ``r`` tokens of a frame fewer after each layer but the last, in one of the ``WAYS``."""
    from vidtok.systems.stop import clip, tower

    generator, begin = torch.Generator().manual_seed(seed), clip.begin

    def other(*args: Any) -> Any:
        run = begin(*args)
        return None if run is None else divert(run, way, generator, model.sizes.grid)

    model.set_tome(r, prop_attn=way == "tome")
    # The plain tower and STOP's each hold the name.
    with patch.object(clip, "begin", other), patch.object(tower, "begin", other):
        yield
    model.set_tome(0)


@torch.no_grad()
def milliseconds(model: Any, cases: list[tuple[str, int]], batch: dict[str, torch.Tensor], repeats: int) -> list[float]:
    """Median time of a video on the processor, which other processes do not add to; the cases take turns."""
    found: list[list[float]] = [[] for _ in cases]
    for _ in range(repeats + 1):
        for (way, r), times in zip(cases, found, strict=True):
            with reduced(model, way, r):
                start = time.process_time()
                model.encode_video(batch["video"], batch["video_mask"])
                times.append(1e3 * (time.process_time() - start) / len(batch["video"]))
    return [median(times[1:]) for times in found]


def peak(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """MiB that the forward and backward pass of a training step take beyond what is resident before it."""

    def step() -> None:
        text = batch["input_ids"]
        model(text, torch.zeros_like(text), torch.ones_like(text), batch["video"], batch["video_mask"]).backward()
        model.zero_grad(set_to_none=False)

    model.train()
    found = []
    for _ in range(4):
        _forget_peak()
        before = _status_mib("VmRSS")
        step()
        found.append(_status_mib("VmHWM") - before)
    model.eval()
    return median(found[1:])


def measure(data: Path, folder: Path, rs: list[int], frames: int = 4, draws: int = 3, repeats: int = 7) -> list[Line]:
    """One line for each way and r.

    Args:
        data: the set that ``examples/retrieval/make_set.py`` wrote.
        folder: a trained model.
        rs: merges per layer.
        frames: of a video.
        draws: seeds of random dropping, whose mean is taken.
        repeats: timings, whose median is taken.
    """
    from vidtok.data.retrieval import EvaluationClips, FrameLoader, FrameRule, Words, load_pairs, load_tokenizer
    from vidtok.data.retrieval.frames import normalize
    from vidtok.evaluation.retrieval import evaluate
    from vidtok.systems.stop import left, load

    model = load(folder).eval()
    pairs = load_pairs("msrvtt", "test", str(data), str(data / "videos"))
    loader = FrameLoader(FrameRule(frames, model.sizes.image), None, "auto", False)
    clips: Any = EvaluationClips(pairs, loader)
    words = Words(load_tokenizer(folder), model.config.max_words)
    held = [clips[i] for i in range(len(clips))]
    clips.__class__ = type("Held", (EvaluationClips,), {"__getitem__": lambda self, index: held[index]})
    few = torch.stack([item["video"] for item in held[:32]])
    ids, _ = words([pairs.captions[i] for i in range(len(few))])
    batch = {"video": normalize(few), "video_mask": torch.ones(len(few), frames), "input_ids": ids}
    shared = {
        "videos": len(clips),
        "model": f"{model.sizes.vision_layers} layers of {model.sizes.vision_width}, {frames} frames",
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": f"vidtok {vidtok.__version__}, torch {torch.__version__}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    lines = []
    cases = [("tome", 0)] + [(way, r) for r in rs if r for way in WAYS]
    for (way, r), ms in zip(cases, milliseconds(model, cases, batch, repeats), strict=True):
        scores = []
        for seed in range(draws if way == "random" else 1):
            with reduced(model, way, r, seed):
                found = evaluate(model, clips, words, batch_size=32)
                scores.append(
                    [getattr(found[k], n) for k in ("text_to_video", "video_to_text") for n in ("r1", "r5", "r10")]
                )
        with reduced(model, way, r):
            mib = peak(model, batch)
            counts = [model.sizes.grid**2 + 1] * model.sizes.vision_layers if r == 0 else left(model.tome, model.sizes)
        recalls = [round(mean(column), 2) for column in zip(*scores, strict=True)]
        lines.append(
            Line(way, r, " ".join(map(str, counts)), *recalls, len(scores), round(ms, 3), round(mib, 1), **shared)
        )  # type: ignore[arg-type]
        print(lines[-1].way, r, recalls, round(ms, 3), round(mib, 1), flush=True)
    return lines


def block(path: Path = CSV) -> str:
    """The README's block."""
    if not path.exists():
        return "Not yet measured.\n"
    lines = read(path)
    first, draws = lines[0], max(line.draws for line in lines)
    share = first.t2v_r1 / 100
    spread = max(abs(line.t2v_r1 - first.t2v_r1) for line in lines)
    half = 196 * (share * (1 - share) / first.videos) ** 0.5
    told = "wider than the" if half > spread else "narrower than the largest of the"
    text = [
        f"{first.videos} test videos of the set that `examples/retrieval` makes (chance of R@1: "
        f"{100 / first.videos:.1f} %), a CLIP4Clip of {first.model}, trained there from scratch without merging and "
        f"reduced in evaluation only. The 95 % interval of an R@1 of so many queries is ± {half:.0f} points, {told} "
        f"differences here; {draws} random drops are averaged. Time is that of the processor, memory the peak of "
        "forward and backward of 32 videos beyond what is there before. "
        f"{first.machine}; {first.versions}; commit {first.commit}, {first.date}. "
        f"[All numbers]({path.relative_to(ROOT).as_posix()}).",
        "",
        "| r | tokens of a frame after the layers | way | text to video R@1 / 5 / 10 | video to text R@1 | a video "
        "| training step |",
        "|--:|---|---|---|--:|--:|--:|",
    ]
    before = None
    for line in lines:
        new = line.r != before
        before = line.r
        name = WAYS[line.way] if line.r else "no reduction"
        text.append(
            f"| {line.r if new else ''} | {line.tokens if new else ''} | {name} | "
            f"{line.t2v_r1:.1f} / {line.t2v_r5:.1f} / {line.t2v_r10:.1f} | {line.v2t_r1:.1f} | {line.ms:.2f} ms | "
            f"{line.mib:.0f} MiB |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure, and fill the README."""
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=main.__doc__)
    parser.add_argument("--set", type=Path, required=True, help="folder that examples/retrieval/make_set.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--r", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    write(measure(args.set, args.model, args.r, args.frames))
    from bench import readme

    newest = readme.latest()
    if newest is not None:
        readme.update(newest)


if __name__ == "__main__":
    main()
