"""Accuracy against the patches that are left, drawn from the CSV."""

from __future__ import annotations

from pathlib import Path

from bench.accuracy.results import CSV, Line, read
from bench.accuracy.ways import WAYS


def draw(path: Path = CSV) -> Path:
    """Write the picture beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read(path)
    plain = next(line for line in lines if line.schedule == "none")

    def halves(line: Line) -> bool:
        return len(set(line.schedule.split())) > 1

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, title, chosen in (
        (axes[0], "as many fewer after every block", lambda line: not halves(line)),
        (axes[1], "halved at one, two or three blocks", halves),
    ):
        axis.axhline(plain.mean, color="0.6", lw=1, label=f"all {plain.mean_tokens:.0f} patches")
        for number, (way, name) in enumerate(WAYS.items()):
            points = sorted(
                (line for line in lines if line.way == way and chosen(line)), key=lambda line: line.mean_tokens
            )
            if points:
                axis.errorbar(
                    [line.mean_tokens for line in points],
                    [line.mean for line in points],
                    [line.deviation for line in points],
                    marker="osD^vx"[number],
                    ms=4,
                    lw=1.2,
                    capsize=2,
                    color=f"C{number}",
                    label=name,
                )
        axis.set(title=title, xlabel="patches, mean over attention and MLP of all blocks")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{plain.data} top-1, %")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out
