"""Runs of retrieval training that stop and go on: checkpoints, logs, and scores that a kill left out."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from tests.training.retrieval_parts import RECIPE, Small, log, run, same, state
from vidtok.data.retrieval import TrainingPairs
from vidtok.systems.stop import Config
from vidtok.training import checkpoints as checkpoints_module
from vidtok.training.retrieval import Recipe, accelerator_for

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize(
    ("recipe", "steps", "stop"),
    [
        (RECIPE, 16, 8),
        (RECIPE, 16, 5),
        (replace(RECIPE, accumulation=2), 16, 7),
        # 5 parts of 3 pairs in an epoch: a step of 4 parts and one of the last.
        (replace(RECIPE, batch_size=12, accumulation=4), 8, 3),
    ],
    ids=["two epochs", "amid an epoch", "parts", "uneven parts"],
)
def test_going_on_is_bit_exact(data: TrainingPairs, tmp_path: Path, recipe: Recipe, steps: int, stop: int) -> None:
    whole = run(data, tmp_path / "whole", recipe, log_every=1)
    first = run(data, tmp_path / "parts", recipe, stop_after=stop, log_every=1)
    assert (whole.steps, first.steps) == (steps, stop)
    # The other model begins elsewhere, and the random state is not where the first part left it.
    torch.manual_seed(12345)
    second = run(data, tmp_path / "parts", recipe, Small(seed=9), resume="auto", log_every=1)
    assert second.steps == steps and same(state(whole.model), state(second.model))
    assert [line["loss"] for line in log(tmp_path / "parts")] == [line["loss"] for line in log(tmp_path / "whole")]


def test_the_random_state_is_part_of_a_checkpoint(
    data: TrainingPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole")
    run(data, tmp_path / "parts", stop_after=8)
    real = checkpoints_module.Checkpoints.load

    def forget(self: Any, which: Any) -> int:
        steps = real(self, which)
        torch.manual_seed(99)
        return steps

    monkeypatch.setattr(checkpoints_module.Checkpoints, "load", forget)
    assert not same(state(whole.model), state(run(data, tmp_path / "parts", resume="auto").model))


def test_checkpoints_that_stay(data: TrainingPairs, tmp_path: Path) -> None:
    run(data, tmp_path, keep=2, save_steps=3)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == ["step_00000015", "step_00000016"]


def test_a_run_killed_while_saving_leaves_the_one_before(
    data: TrainingPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole")
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if "00000008" in str(target):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "parts")
    again = run(data, tmp_path / "parts", resume="auto")
    assert same(state(whole.model), state(again.model))
    assert not list((tmp_path / "parts/checkpoints").glob(".*00000004*"))


def test_checkpoints_of_two_runs_do_not_mix(data: TrainingPairs, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", save_steps=3)
    with pytest.raises(ValueError, match=r"without checkpoints of another run .*step_00000016\), got 2 in"):
        run(data, tmp_path / "whole")
    run(data, tmp_path / "other", stop_after=4)
    with pytest.raises(ValueError, match="without checkpoints of another run"):
        run(data, tmp_path / "whole", resume=tmp_path / "other/checkpoints/step_00000004")
    # Going back leaves nothing of what was done after it.
    first = tmp_path / "whole/checkpoints/step_00000015"
    again = run(data, tmp_path / "whole", resume=first, stop_after=1)
    assert again.steps == 16 and same(state(whole.model), state(again.model))
    run(data, tmp_path / "other", resume="auto")
    back = run(data, tmp_path / "other", resume=tmp_path / "other/checkpoints/step_00000012", stop_after=2)
    assert back.steps == 14
    assert sorted(p.name for p in (tmp_path / "other/checkpoints").iterdir()) == ["step_00000012", "step_00000014"]


def test_a_run_killed_before_it_evaluates_evaluates_when_it_goes_on(data: TrainingPairs, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def score(model: Any, epoch: int, kill: int | None = None) -> dict[str, float]:
        if epoch == kill:
            raise KeyboardInterrupt
        weights = state(accelerator_for(RECIPE, cpu=True).unwrap_model(model))
        seen.append((epoch, same(weights, after.setdefault(epoch, weights))))
        return {"right": float(epoch)}

    after: dict[int, dict[str, torch.Tensor]] = {}
    whole = run(data, tmp_path / "whole", evaluate=score)
    lines = [(line["step"], line["right"]) for line in log(tmp_path / "whole") if "right" in line]
    assert lines == [(4, 0), (8, 1), (12, 2), (16, 3)]
    for kill, folder in ((0, "first"), (1, "second"), (3, "last")):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / folder, evaluate=lambda m, e, kill=kill: score(m, e, kill))
        # Killed amid a line, too.
        with (tmp_path / folder / "log.jsonl").open("a") as file:
            file.write('{"step": ' + str(4 * kill + 4))
        seen.clear()
        done = run(data, tmp_path / folder, resume="auto", evaluate=score)
        assert seen == [(epoch, True) for epoch in range(kill, 4)] and done.scores[-1] == {"right": 3.0}
        assert same(state(done.model), state(whole.model))
        text = (tmp_path / folder / "log.jsonl").read_text().replace('{"step": ' + str(4 * kill + 4) + "\n", "")
        found = [json.loads(line) for line in text.splitlines()]
        assert [(line["step"], line["right"]) for line in found if "right" in line] == lines
        # Nothing is evaluated twice.
        seen.clear()
        assert run(data, tmp_path / folder, resume="auto", evaluate=score).scores == seen == []


def test_each_run_has_a_log_of_its_own(data: TrainingPairs, tmp_path: Path) -> None:
    run(data, tmp_path, stop_after=4, log_every=1)
    run(data, tmp_path, resume="auto", log_every=4)
    first = (tmp_path / "log.jsonl").read_text()
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 8, 12, 16]
    for number in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints")
        run(data, tmp_path, resume="auto" if number == 1 else None, log_every=8)
        assert [line["step"] for line in log(tmp_path)] == [8, 16]
        assert (tmp_path / "log.1.jsonl").read_text() == first and (tmp_path / "log.2.jsonl").exists() == (number == 2)


def test_the_settings_of_the_model_are_those_of_the_checkpoint(data: TrainingPairs, tmp_path: Path) -> None:
    def model(**settings: Any) -> Small:
        small = Small()
        small.config = Config(**settings)  # type: ignore[assignment]
        return small

    run(data, tmp_path, model=model(tome_r=2), stop_after=4)
    with pytest.raises(ValueError, match=r"the same settings .*got tome_r 2 instead of 4$"):
        run(data, tmp_path, model=model(tome_r=4), resume="auto")
    assert run(data, tmp_path, model=model(tome_r=2, tome_trace_source=True), resume="auto").steps == 16
