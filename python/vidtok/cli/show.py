"""What ``vidtok run`` prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vidtok.cli.load import Loaded
from vidtok.cli.run import Options, Outcome, execute


def run(options: Options, make: Callable[[], Loaded] | None = None) -> Outcome:
    """Run with progress on standard error and results on standard output; write the report if asked."""
    from vidtok.cli import page

    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bars:
        task: Any = None

        def notify(text: str, done: int | None, total: int | None) -> None:
            nonlocal task
            if task is None or bars.tasks[-1].description != text:
                if task is not None:
                    bars.update(task, total=1, completed=1)
                task = bars.add_task(text, total=total)
                if not sys.stderr.isatty():
                    print(f"{text} …", file=sys.stderr, flush=True)
            bars.update(task, completed=done or 0, total=total)

        outcome = execute(options, notify, make)
        if options.report is not None:
            notify("Drawing the report", None, None)
            page.write(options.report, page.render(outcome))
    _print(outcome)
    return outcome


def _print(outcome: Outcome) -> None:
    from vidtok.cli.page import number, ratio

    out = Console(highlight=False)
    t, h, w = outcome.sample.grid_thw
    video = outcome.video
    out.print(Text(outcome.name, "bold"), Text(f" on {outcome.device}, {outcome.dtype}"), sep="")
    height, width = video.frames.shape[-2:]
    out.print(
        f"{len(video.index)} of {video.source_frames} frames, {width} x {height} pixels, "
        f"token grid {t} x {h} x {w} ({video.backend})"
    )
    dropped = f" decoder={outcome.options.decoder}" if outcome.options.decoder else ""
    merged = f"vision={outcome.options.vision} " if outcome.options.vision else ""
    out.print(Text(f"{merged}visual={outcome.visual}{dropped}"))
    out.print()
    if outcome.full is not None:
        _answer(out, "Unreduced", outcome.full_answer or "")
    _answer(out, "Reduced", outcome.answer)
    out.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    if outcome.full is not None:
        table.add_column("unreduced", justify="right")
        table.add_column("reduced", justify="right")
        table.add_column("", justify="right")
    else:
        table.add_column("before", justify="right")
        table.add_column("reduced", justify="right")
    for label, unit, full, reduced in outcome.rows:
        cells = [label, number(full, unit) if full is not None else "", number(reduced, unit)]
        table.add_row(*cells, *([ratio(full, reduced)] if outcome.full is not None else []))
    out.print(table)
    if outcome.full is not None:
        first = ratio(outcome.full.first_token, outcome.reduced.first_token)
        total = ratio(outcome.full.total, outcome.reduced.total)
        out.print()
        out.print(f"Speed-up: {first} to the first token, {total} for the answer in all.", style="bold")
    if outcome.disturbed:
        out.print()
        out.print(outcome.disturbed, style="yellow")
    if outcome.random:
        out.print()
        text = "The weights are random: the answer is noise, while tokens, times and memory are real."
        out.print(text, style="yellow")
    if outcome.options.report is not None:
        out.print(Text(f"Report: {outcome.options.report}"))


def _answer(out: Console, label: str, text: str) -> None:
    out.print(Text(f"{label} answer: ", "bold") + Text(text or "(nothing)", ""))
