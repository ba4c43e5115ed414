"""Notes and bars of commands that run long, on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vidtok.cli.errors import one_line


class Talk:
    """Progress and notes on standard error, from the main process."""

    def __init__(self, main: bool) -> None:
        self.main = main
        self._bars: Any = None

    def __call__(self, text: str) -> None:
        if self.main:
            print(one_line(text, 1000), file=sys.stderr, flush=True)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Warnings inside become notes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for entry in caught:
            self(str(entry.message))

    @contextmanager
    def bar(self, title: str) -> Iterator[Any]:
        """A function of (done, total, note) that moves a bar, on a terminal; a second one stands below the first."""
        if not self.main or not sys.stderr.isatty():
            yield lambda done, total, note="": None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        outer = self._bars
        if outer is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(title, total=None)
        try:
            yield lambda done, total, note="": bars.update(
                task, completed=done, total=total, description=f"{title} {note}".strip()
            )
        finally:
            bars.remove_task(task)
            if outer is None:
                bars.stop()
                self._bars = None
