"""Two pictures of one CSV: time over the limit of every side, and speed-up over each other side."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.row import Row, read

COLOURS = {"vidtok": "#0b6e4f", "compile": "#4c78a8", "careful": "#b08bbb", "eager": "#c44e52"}
OTHER = "#e0a458"


def _cases(rows: list[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == "time" and row.cache == "cold":
            cases.setdefault(f"{row.operator}  {row.case}", []).append(row)
    return cases


def _dots(path: Path, title: str, label: str, points: dict[str, list[tuple[str, float]]], line: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.24 * len(points)))
    for y, values in enumerate(points.values()):
        for role, value in values:
            colour = COLOURS.get(role, OTHER)
            axes.plot(value, y, "o", color=colour, markersize=7 if role == "vidtok" else 5, alpha=0.9)
    axes.axvline(line, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(points)), list(points), fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    roles = list(dict.fromkeys(role for values in points.values() for role, _ in values))
    known = [r for r in roles if r in COLOURS] + (["other"] if any(r not in COLOURS for r in roles) else [])
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS.get(r, OTHER), label=r) for r in known]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw(path: Path) -> list[Path]:
    """Write ``<name>-limit.png`` and ``<name>-speedup.png`` beside the CSV."""
    return draw_rows(read(path), path)


def draw_rows(rows: list[Row], path: Path) -> list[Path]:
    """The same from rows that are at hand."""
    where = f"{rows[0].machine}, cold cache"
    limit = {k: [(r.role, r.over_limit) for r in v if r.over_limit] for k, v in _cases(rows).items()}
    faster = {k: [(r.role, r.speedup) for r in v if r.role != "vidtok" and r.speedup] for k, v in _cases(rows).items()}
    out = [path.with_name(f"{path.stem}-{kind}.png") for kind in ("limit", "speedup")]
    _dots(out[0], f"Time over the machine's limit. {where}", "time / limit", limit, 1.0)
    _dots(out[1], f"How many times longer the others take. {where}", "time / vidtok's time", faster, 1.0)
    return out


if __name__ == "__main__":
    for made in draw(Path(sys.argv[1])):
        print(made)
