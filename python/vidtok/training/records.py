"""What a run says of itself: JSON lines, and TensorBoard's files if asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidtok._check import fail


class Records:
    """Writes ``log.jsonl`` in a folder, in the main process only.

    Args:
        folder: made if absent.
        accelerator: knows which process is the main one.
        tensorboard: also write its files to ``folder/tensorboard``.

    Raises:
        ImportError: when TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, accelerator: Any, tensorboard: bool = False) -> None:
        self._main = bool(accelerator.is_main_process)
        self._file: Any = None
        self._board: Any = None
        if not self._main:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                fail("the package tensorboard for its files (pip install tensorboard)", "none", ImportError)
            self._board = SummaryWriter(str(folder / "tensorboard"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._start = time.monotonic()

    def step(self, step: int, epoch: int, loss: float, rates: list[float]) -> None:
        """One line about a training step."""
        self._write(step, {"epoch": epoch, "loss": loss, "lr": max(rates)})

    def scores(self, step: int, epoch: int, result: Any) -> None:
        """One line about an evaluation."""
        if isinstance(result, Mapping):
            values = {}
            for name, part in result.items():
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
