"""What a run says of itself: JSON lines, and TensorBoard's files if asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from vidtok._check import fail


class Records:
    """Writes ``log.jsonl`` in a folder, in the main process only.

    Args:
        folder: made if absent.
        accelerator: knows which process is the main one.
        tensorboard: also write its files to ``folder/tensorboard``.
        fresh: a run begins here: the log of one before it becomes ``log.1.jsonl``, or the next number that is free.

    Raises:
        ImportError: when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, accelerator: Any, tensorboard: bool = False, fresh: bool = False) -> None:
        self._main = bool(accelerator.is_main_process)
        self._file: Any = None
        self._board: Any = None
        #: In the main process: after which steps an evaluation was in the log from the beginning.
        self.scored: set[int] = set()
        if not self._main:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("the package tensorboard for its files (pip install tensorboard)", "none", ImportError)
            self._board = SummaryWriter(str(folder / "tensorboard"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if fresh and path.exists():
            path.rename(next(p for n in count(1) if not (p := folder / f"log.{n}.jsonl").exists()))
        said = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self.scored = _scored(said)
        self._file = path.open("a", encoding="utf-8")
        if said and not said.endswith("\n"):
            # A process killed amid a line.
            self._file.write("\n")
        self._start = time.monotonic()

    def step(self, step: int, epoch: int, loss: float, rates: list[float]) -> None:
        """One line about a training step."""
        self._write(step, {"epoch": epoch, "loss": loss, "lr": max(rates)})

    def scores(self, step: int, epoch: int, result: Any) -> None:
        """One line about an evaluation."""
        values = {}
        for name, part in result.items() if isinstance(result, Mapping) else ():
            flat = part.as_dict() if hasattr(part, "as_dict") else {"": part}
            values.update({f"{name}/{k}".strip("/"): v for k, v in flat.items()})
        self._write(step, {"epoch": epoch, **values})

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if not self._main:
            return
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _scored(log: str) -> set[int]:
    found = set()
    for line in log.splitlines():
        try:
            values = json.loads(line)
            if "loss" not in values:
                found.add(int(values["step"]))
        except (ValueError, KeyError, TypeError):
            # A line that was cut off says nothing.
            continue
    return found
