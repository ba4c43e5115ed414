"""One line of the CSV is one way at one schedule; the README's table and the picture read only that."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from bench.accuracy.ways import WAYS
from bench.row import RESULTS, ROOT

CSV = RESULTS / "accuracy.csv"
MARKS = ("<!-- accuracy:begin -->", "<!-- accuracy:end -->")
# 97.5 % quantiles of Student's t.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Line:
    """Accuracy in %, of each seed, of a way that leaves ``tokens`` patches after each block."""

    schedule: str
    way: str
    tokens: str
    mean_tokens: float
    accuracy: str
    data: str
    images: int
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def seeds(self) -> list[float]:
        return [float(value) for value in self.accuracy.split()]

    @property
    def mean(self) -> float:
        return mean(self.seeds)

    @property
    def deviation(self) -> float:
        return stdev(self.seeds)


def write(lines: list[Line], path: Path = CSV) -> None:
    """Replace the file by these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Line)])
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def read(path: Path = CSV) -> list[Line]:
    """Lines of a file that :func:`write` made."""
    with path.open(newline="") as file:
        return [
            Line(**{**record, "mean_tokens": float(record["mean_tokens"]), "images": int(record["images"])})  # type: ignore[arg-type]
            for record in csv.DictReader(file)
        ]


def interval(a: Line, b: Line) -> tuple[float, float]:
    """Mean of ``a - b`` over the seeds, in points, and half the width of its 95 % interval."""
    differences = [x - y for x, y in zip(a.seeds, b.seeds, strict=True)]
    n = len(differences)
    return mean(differences), _T[n - 1] * stdev(differences) / math.sqrt(n)


def verdict(ours: Line, others: list[Line]) -> str:
    """Merging against the best of the other ways, in words."""
    best = max(others, key=lambda line: line.mean)
    difference, half = interval(ours, best)
    name = WAYS[best.way]
    # No minus before a zero.
    text = f"{round(difference, 1) + 0.0:+.1f} ± {half:.1f}"
    if abs(difference) <= half:
        return f"tie with {name} ({text})"
    return f"ToMe ahead of {name} ({text})" if difference > 0 else f"**{name} ahead** ({text})"


def _cell(line: Line | None, best: float) -> str:
    if line is None:
        return ""
    text = f"{line.mean:.1f} ± {line.deviation:.1f}"
    return f"**{text}**" if line.mean == best else text


def table(lines: list[Line]) -> list[str]:
    """One row of a schedule, one column of a way."""
    schedules: dict[str, dict[str, Line]] = {}
    for line in lines:
        schedules.setdefault(line.schedule, {})[line.way] = line
    out = [
        "| patches left after the blocks | "
        + " | ".join(WAYS.values())
        + " | ToMe against pooling | ToMe against dropping |",
        "|---|" + "--:|" * len(WAYS) + "---|---|",
    ]
    for schedule, ways in schedules.items():
        if schedule == "none":
            continue
        first = next(iter(ways.values()))
        best = max(line.mean for line in ways.values())
        others = [[ways[w] for w in kind if w in ways] for kind in (("pool", "pool-sized"), ("uniform", "random"))]
        said = " | ".join(verdict(ways["tome"], part) if part else "" for part in others)
        cells = [_cell(ways.get(way), best) for way in WAYS]
        out.append(f"| {first.tokens} | " + " | ".join(cells) + f" | {said} |")
    return out


def tally(rows: list[str], column: int) -> str:
    """How often merging is ahead, level and behind in a column of the table."""
    said = [row.split("|")[column].strip() for row in rows[2:]]
    ahead, level = sum(t.startswith("ToMe") for t in said), sum(t.startswith("tie") for t in said)
    behind = sum(t.startswith("**") for t in said)
    total = ahead + level + behind
    return f"merging is ahead in {ahead} of {total} rows, level in {level} and behind in {behind}"


def block(path: Path = CSV) -> str:
    """The README's block."""
    if not path.exists():
        return "Not yet measured.\n"
    lines = read(path)
    plain = next(line for line in lines if line.schedule == "none")
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    text = [
        f"Top-1 accuracy in % on {plain.images} test pictures of {plain.data}, mean ± standard deviation of "
        f"{len(plain.seeds)} seeds, of a vision transformer trained here ({plain.mean_tokens:.0f} patches, "
        f"6 blocks) and never trained with fewer tokens; with all patches {plain.mean:.1f} ± {plain.deviation:.1f}. "
        f"{plain.versions}; commit {plain.commit}, {plain.date}. [All numbers]({name}.csv), [a picture]({name}.png).",
        "",
        "Every way of a row leaves the same number of patches after every block, between its attention and its MLP, so "
        "tokens per block and final tokens are equal; the class token always stays. Pooling halves a grid, so it "
        "is only there where a schedule halves. The last columns are ToMe less the better of the two kinds of pooling "
        "and of dropping, with the 95 % interval of the paired difference over the seeds (Student's t); a difference "
        "inside it is called a tie.",
        "",
        *(rows := table(lines)),
        "",
        *(f"Against {kind} {tally(rows, column)}." for kind, column in (("pooling", -3), ("dropping", -2))),
    ]
    return "\n".join(text) + "\n"
