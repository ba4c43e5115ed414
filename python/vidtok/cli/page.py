"""The report page: one file, no network, pictures from the trace of the executed plan."""

from __future__ import annotations

import base64
import io
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vidtok
from vidtok.plan import Plan

if TYPE_CHECKING:
    from vidtok.cli.run import Outcome

_STAGES = {
    "decode": "Video decode",
    "vision": "Vision tower",
    "decide": "Decide",
    "move": "Move",
    "prefill": "Prefill",
    "decoding": "Decoding",
}


@dataclass(frozen=True)
class Cell:
    """One input token on the page: where it is, what became of it, and of which output it is part."""

    row: int
    column: int
    state: str
    output: int
    anchor: bool
    hue: int


@dataclass(frozen=True)
class Moment:
    """One temporal position of the grid with its picture."""

    number: int
    seconds: float
    picture: str
    cells: list[Cell]
    outline: str
    kept: int
    merged: int
    groups: int
    dropped: int


def cells(plan: Plan, grid_thw: tuple[int, int, int]) -> list[list[Cell]]:
    """What became of every token, by frame, read from ``plan.trace``.

    ``kept``: alone in its output; ``merged``: with others in one (the first, where windows overlap);
    ``dropped``: in none.
    """
    t, h, w = grid_thw
    owner: dict[tuple[int, int, int], int] = {}
    size: list[int] = []
    for number, members in enumerate(plan.trace([grid_thw])):
        size.append(len(members))
        for _, moment, row, column in members:
            owner.setdefault((moment, row, column), number)
    anchors = set(plan.anchor.tolist())
    groups = [m for m, n in enumerate(size) if n > 1]
    # Steps of the golden angle keep neighbouring groups apart.
    hue = {m: round(i * 137.508) % 360 for i, m in enumerate(groups)}
    frames: list[list[Cell]] = []
    for f in range(t):
        frame: list[Cell] = []
        for r in range(h):
            for c in range(w):
                m = owner.get((f, r, c), -1)
                state = "dropped" if m < 0 else "merged" if size[m] > 1 else "kept"
                frame.append(Cell(r, c, state, m, (f * h + r) * w + c in anchors, hue.get(m, 0)))
        frames.append(frame)
    return frames


def outline(frame: Sequence[Cell], h: int, w: int) -> str:
    """SVG path along every edge between tokens of different outputs."""
    at = {(c.row, c.column): c.output for c in frame}
    parts = []
    for r in range(h):
        for c in range(w):
            here = at[r, c]
            if c + 1 < w and (at[r, c + 1] != here):
                parts.append(f"M{c + 1} {r}v1")
            if r + 1 < h and (at[r + 1, c] != here):
                parts.append(f"M{c} {r + 1}h1")
    return "".join(parts)


def jpeg(frame: torch.Tensor, limit: int = 640) -> str:
    """A uint8 ``[3, H, W]`` frame as a data URI."""
    from PIL import Image

    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    if image.width > limit:
        image = image.resize((limit, max(1, round(image.height * limit / image.width))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def moments(outcome: Outcome) -> list[Moment]:
    """Pictures and cells of every temporal position."""
    sample, video, step = outcome.sample, outcome.video, outcome.temporal_patch_size
    _, h, w = sample.grid_thw
    out = []
    for f, frame in enumerate(cells(sample.plan, sample.grid_thw)):
        index = min(f * step, len(video.timestamps) - 1)
        merged = {c.output for c in frame if c.state == "merged"}
        counts = {s: sum(c.state == s for c in frame) for s in ("kept", "merged", "dropped")}
        out.append(
            Moment(
                f + 1,
                video.timestamps[index],
                jpeg(video.frames[index]),
                frame,
                outline(frame, h, w),
                counts["kept"],
                counts["merged"],
                len(merged),
                counts["dropped"],
            )
        )
    return out


def number(value: float | None, unit: str) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if unit == "tokens":
        return f"{value:,.0f}".replace(",", " ")
    if unit == "FLOPs":
        return f"{value / 1e12:.2f} TFLOPs" if value >= 1e12 else f"{value / 1e9:.3g} GFLOPs"
    if unit == "B":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 1e-2 else f"{value * 1e3:.2f} ms"


def ratio(full: float | None, reduced: float) -> str:
    """How many times less."""
    if full is None or reduced <= 0 or full <= 0:
        return ""
    return f"{full / reduced:.2f} ×"


def _stages(outcome: Outcome) -> list[dict[str, Any]]:
    """Stacked bars: one per run, each stage a share of the longest run."""
    runs = [("unreduced", outcome.full)] if outcome.full else []
    bars = []
    for label, run in [*runs, ("reduced", outcome.reduced)]:
        assert run is not None
        bars.append((label, {"decode": outcome.decode_seconds, **run.times}))
    longest = max(sum(times.values()) for _, times in bars) or 1.0
    return [
        {
            "label": label,
            "total": number(sum(times.values()), "s"),
            "parts": [
                {"key": k, "name": _STAGES[k], "share": 100 * times[k] / longest, "text": number(times[k], "s")}
                for k in _STAGES
                if times.get(k, 0) > 0
            ],
        }
        for label, times in bars
    ]


def _tiles(outcome: Outcome) -> list[dict[str, str]]:
    full, reduced = outcome.full, outcome.reduced
    share = 100 * outcome.visual_out / outcome.visual_in
    was, now = number(outcome.visual_in, "tokens"), number(outcome.visual_out, "tokens")
    tiles = [{"name": "Visual tokens", "big": now, "small": f"of {was}, {share:.0f} %"}]
    for name, before, after, unit in (
        ("Time to first token", full.first_token if full else None, reduced.first_token, "s"),
        ("Answer in all", full.total if full else None, reduced.total, "s"),
        ("Memory above idle", full.extra_bytes if full else None, reduced.extra_bytes, "B"),
    ):
        small = f"{number(after, unit)} instead of {number(before, unit)}" if before else "compare with --compare"
        tiles.append({"name": name, "big": ratio(before, after) or number(after, unit), "small": small})
    return tiles


def render(outcome: Outcome) -> str:
    """The page as HTML; everything shown is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    sample = outcome.sample
    table = []
    for label, unit, full, reduced in outcome.rows:
        most = max(full or 0.0, reduced) or 1.0
        table.append(
            {
                "label": label,
                "full": number(full, unit),
                "reduced": number(reduced, unit),
                "ratio": ratio(full, reduced),
                "full_share": 100 * (full or 0.0) / most,
                "reduced_share": 100 * reduced / most,
            }
        )
    views = moments(outcome)
    import transformers

    versions = f"vidtok {vidtok.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return environment.get_template("report.html.j2").render(
        outcome=outcome,
        file=os.path.basename(outcome.options.video),
        grid=sample.grid_thw,
        moments=views,
        totals={
            "kept": sum(m.kept for m in views),
            "merged": sum(m.merged for m in views),
            "groups": len({c.output for m in views for c in m.cells if c.state == "merged"}),
            "dropped": sum(m.dropped for m in views),
        },
        tiles=_tiles(outcome),
        stages=_stages(outcome),
        stage_names=_STAGES,
        table=table,
        versions=f"{versions}, Python {platform.python_version()}",
        clock=lambda s: f"{int(s) // 60}:{s % 60:04.1f}",
    )


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write the whole file or nothing."""
    target = Path(path).resolve()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
