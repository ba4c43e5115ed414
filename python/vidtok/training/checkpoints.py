"""Checkpoints of a training run, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidtok._check import fail
from vidtok.data._decode import shown

_FACTS = "run.json"


class Checkpoints:
    """Everything a run needs to go on: weights, optimizer, schedule, scaler and random states.

    Args:
        folder: where ``step_…`` folders go.
        accelerator: whose state it is.
        facts: settings that a checkpoint must share with the run that goes on from it.
        keep: how many stay.
    """

    def __init__(self, folder: Path, accelerator: Any, facts: Mapping[str, Any], keep: int = 2) -> None:
        if keep < 1:
            fail("at least 1 checkpoint to keep", f"{keep}")
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep
        self.facts = json.loads(json.dumps(dict(facts)))

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step_*") if (p / _FACTS).is_file() and p.name[5:].isdigit())

    def save(self, steps: int) -> Path:
        """Write one; a run killed meanwhile leaves the ones before."""
        target = self.folder / f"step_{steps:08d}"
        partial = self.folder / f".{target.name}.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if main:
            (partial / _FACTS).write_text(json.dumps({"steps": steps, "settings": self.facts}), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            known = self.all()
            # Training went back: what it did after this step the first time is no part of it now.
            ahead = [p for p in known if int(p.name[5:]) > steps]
            for old in [*known[: len(known) - len(ahead)][: -self.keep], *ahead]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return target

    def load(self, which: str | Path | None) -> int:
        """Go on from a checkpoint folder or from ``auto``, the newest one; returns the steps that were done.

        Raises:
            ValueError: for a folder that is none, or whose settings differ, with the differences named; for a run that
                would put its checkpoints among those of another.
        """
        known = self.all()
        if str(which) == "auto":
            which = known[-1] if known else None
        if known and (which is None or Path(which).resolve().parent != self.folder.resolve()):
            fail(
                f"an output folder without checkpoints of another run (resume auto goes on from {known[-1].name})",
                f"{len(known)} in {shown(str(self.folder))}",
            )
        if which is None:
            return 0
        place = Path(which)
        try:
            said = json.loads((place / _FACTS).read_text(encoding="utf-8"))
            steps, settings = int(said["steps"]), dict(said["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"a checkpoint folder with {_FACTS}", shown(str(place)))
        names = sorted({*settings, *self.facts})
        wrong = [n for n in names if settings.get(n) != self.facts.get(n)]
        if wrong:
            pairs = ", ".join(f"{n} {settings.get(n)} instead of {self.facts.get(n)}" for n in wrong[:10])
            fail("a checkpoint of a run with the same settings (init_model takes only its weights)", pairs)
        try:
            self.accelerator.load_state(str(place))
        except Exception as error:  # each of the files has a reader with errors of its own
            text = " ".join(str(error).split())[:200]
            fail("a checkpoint that loads into this model", f"{shown(str(place))} ({text})")
        return steps
