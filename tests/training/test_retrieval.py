"""Training of retrieval models: rates, accumulation, precision, what does not decode, several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState

from tests.training.retrieval_parts import Each, Small, log, pairs_of, run, same, scores, state
from vidtok.data import VideoError
from vidtok.data.retrieval import TrainingPairs
from vidtok.training.retrieval import Recipe

pytestmark = pytest.mark.usefixtures("fresh")


def test_other_processes_decode_the_same(data: TrainingPairs, tmp_path: Path) -> None:
    one = run(data, tmp_path / "one", stop_after=5)
    assert same(state(one.model), state(run(data, tmp_path / "two", stop_after=5, workers=2).model))


def test_seeds_decide(data: TrainingPairs, tmp_path: Path) -> None:
    one, two = (state(run(data, tmp_path / f"{i}").model) for i in range(2))
    other = Recipe(lr=1e-2, coef_lr=0.5, epochs=4, batch_size=4, seed=2)
    assert same(one, two) and not same(one, state(run(data, tmp_path / "other", other).model))


def test_rates_rise_and_follow_a_cosine(data: TrainingPairs, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-2, coef_lr=0.5, epochs=5, batch_size=4, warmup=0.2)
    run(data, tmp_path, recipe, log_every=1)
    rates = [line["lr"] for line in log(tmp_path)]
    expected = [1e-2 * s / 4 for s in range(1, 4)]
    expected += [1e-2 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 16)) for s in range(4, 21)]
    assert rates == pytest.approx(expected, abs=1e-12) and len(rates) == 20


def test_clips_weights_have_their_own_rate(data: TrainingPairs, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-2, coef_lr=0.0, epochs=1, batch_size=4)
    before, after = state(Small()), state(run(data, tmp_path, recipe).model)
    assert torch.equal(before["clip.weight"], after["clip.weight"])
    assert not torch.equal(before["words.weight"], after["words.weight"])


def test_accumulated_parts_are_one_batch(data: TrainingPairs, tmp_path: Path) -> None:
    models = []
    for parts in (1, 2, 4):
        AcceleratorState._reset_state(True)
        recipe = Recipe(lr=1e-2, coef_lr=1.0, epochs=2, batch_size=4, accumulation=parts, seed=1)
        done = run(data, tmp_path / f"{parts}", recipe, Each(0.0))
        assert done.steps == 8
        models.append(state(done.model))
    for other in models[1:]:
        for name in other:
            torch.testing.assert_close(models[0][name], other[name], rtol=1e-4, atol=1e-6)
    assert not same(models[0], state(Each(0.0)))


def test_it_learns_and_evaluates(data: TrainingPairs, tmp_path: Path) -> None:
    seen: list[int] = []
    told: list[tuple[int, int]] = []

    def score(model: Any, epoch: int) -> dict[str, float]:
        seen.append(epoch)
        return {"right": float(epoch)}

    recipe = Recipe(lr=5e-2, coef_lr=1.0, epochs=6, batch_size=8, seed=1)
    done = run(
        data, tmp_path, recipe, Small(0.0), log_every=1, evaluate=score, notify=lambda s, t, loss: told.append((s, t))
    )
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[-1] < 0.6 * losses[0] and told[-1] == (12, 12)
    assert seen == [0, 1, 2, 3, 4, 5] and done.scores[-1] == {"right": 5.0}
    assert [line["right"] for line in log(tmp_path) if "right" in line] == [0, 1, 2, 3, 4, 5]


def test_the_factor_on_similarities_stays_in_bounds(data: TrainingPairs, tmp_path: Path) -> None:
    model = Small()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    run(data, tmp_path, model=model, stop_after=1)
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(100))


def test_bf16(data: TrainingPairs, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-2, coef_lr=1.0, epochs=1, batch_size=4, amp="bf16")
    kinds: set[torch.dtype] = set()

    class Watched(Small):
        def encode_video(self, video: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            kinds.add(self.clip(video.flatten(2)).dtype)
            return super().encode_video(video, mask)

    done = run(data, tmp_path, recipe, Watched())
    assert kinds == {torch.bfloat16} and math.isfinite(done.loss)
    assert {p.dtype for p in done.model.parameters()} == {torch.float32}


def test_one_caption_per_clip(data: TrainingPairs, tmp_path: Path) -> None:
    single = pairs_of(tmp_path, expand=False)
    assert len(single) == 8 and len(data) == 16
    texts = []
    for epoch in range(2):
        single.begin(epoch)
        texts.append([single[i]["input_ids"].tolist() for i in range(8)])
        assert texts[-1] == [single[i]["input_ids"].tolist() for i in range(8)]
        assert torch.equal(single[3]["video"], single[3]["video"])
    assert 0 < sum(a != b for a, b in zip(*texts)) < 8
    assert run(single, tmp_path).steps == 8


def test_clips_that_do_not_decode_are_replaced_and_named(
    data: TrainingPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(data.frames).load

    def load(self: Any, clip: Any, seed: object = None) -> Any:
        if clip.name in ("2", "3"):
            raise VideoError(f"expected a video that decodes, got {clip.name}")
        return real(self, clip, seed)

    monkeypatch.setattr(type(data.frames), "load", load)
    with pytest.raises(VideoError, match="expected a video that decodes"):
        run(data, tmp_path / "one")
    for expand in (True, False):
        forgiving = TrainingPairs(data.pairs, data.words, data.frames, expand=expand, skip_unreadable=True)
        for workers in (0, 1):
            done = run(forgiving, tmp_path / f"{expand}{workers}", stop_after=4, workers=workers)
            assert done.unreadable and set(done.unreadable) <= {"2", "3"}
        # Two captions of each: the fourth item after the first bad one decodes.
        items = [forgiving[i] for i in range(len(forgiving))]
        assert sorted({int(item["unreadable"]) for item in items}) == [-1, 3]
        assert torch.equal(items[2 if not expand else 4]["input_ids"], items[4 if not expand else 8]["input_ids"])
    every = TrainingPairs(data.pairs, data.words, data.frames, skip_unreadable=True)
    monkeypatch.setattr(type(data.frames), "load", lambda self, clip, seed=None: load(self, data.pairs.clips[2]))
    with pytest.raises(VideoError, match="got 2"):
        every[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 32}, "at least one batch of 32 pairs, got 16 pairs"),
        ({"batch_size": 4, "accumulation": 3}, "a batch_size that 1 processes x 3 parts divide, got 4"),
        ({"amp": "fp16"}, "a GPU for fp16"),
        ({"amp": "tf32"}, "amp among no, bf16, fp16, got 'tf32'"),
        ({"lr": -1.0}, "lr of at least 0"),
        ({"lr": float("nan")}, "lr of at least 0"),
        ({"epochs": 0}, "epochs as a whole number"),
        ({"warmup": 1.5}, "a warmup between 0 and 1"),
    ],
)
def test_bad_recipes(data: TrainingPairs, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(data, tmp_path, Recipe(**changes))


def test_bad_models_losses_and_checkpoints(data: TrainingPairs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a model with weights to train, got one in which all are frozen"):
        run(data, tmp_path, model=Small().requires_grad_(False))
    broken = Small()
    with torch.no_grad():
        broken.words.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"a finite loss .*got nan at step 1"):
        run(data, tmp_path, model=broken, log_every=1)
    run(data, tmp_path / "one", stop_after=4)
    place = tmp_path / "one/checkpoints/step_00000004"
    other = Recipe(lr=2e-2, coef_lr=0.5, epochs=4, batch_size=4, seed=1)
    with pytest.raises(ValueError, match=r"the same settings .*got lr 0.01 instead of 0.02"):
        run(data, tmp_path / "two", other, resume=place)
    with pytest.raises(ValueError, match=r"a checkpoint folder with run.json, got 'nothing'"):
        run(data, tmp_path / "two", resume=tmp_path / "nothing")
    (place / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="a checkpoint that loads into this model") as caught:
        run(data, tmp_path / "two", resume=place)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least 1 checkpoint"):
        run(data, tmp_path / "two", keep=0)


def test_tensorboard_is_optional(data: TrainingPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="expected the package tensorboard"):
        run(data, tmp_path, tensorboard=True)

    class Board:
        said: list[tuple[str, float, int]] = []

        def __init__(self, folder: str) -> None:
            assert folder.endswith("tensorboard")

        def add_scalar(self, *what: Any) -> None:
            self.said.append(what)

        def close(self) -> None:
            self.said.append(("closed", 0, 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("M", (), {"SummaryWriter": Board}))
    run(data, tmp_path, tensorboard=True, log_every=8)
    assert [s[2] for s in Board.said if s[0] == "loss"] == [8, 16] and Board.said[-1][0] == "closed"


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    # What DDP leaves in a cycle ends the process by a signal now and then if it is there until the very end.
    code = f"import gc; from tests.training.retrieval_parts import process; process({str(tmp_path)!r}); gc.collect()"
    (tmp_path / "run.py").write_text(code)
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "run.py")], env=env, cwd=root, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    recipe = Recipe(lr=1e-2, coef_lr=1.0, epochs=2, batch_size=8, seed=3)
    data = pairs_of(tmp_path)
    done_alone = run(
        data, tmp_path / "one", recipe, Small(0.0), log_every=1, evaluate=lambda model, epoch: scores(model, data)
    )
    alone = state(done_alone.model)
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    both = found["state"]
    losses = [[line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4
    for name in alone:
        torch.testing.assert_close(alone[name], both[name], rtol=1e-3, atol=1e-5)
    for one, two in zip(done_alone.scores, found["scores"]):
        assert {k: pytest.approx(v) for k, v in one.items()} == two
    # Each process alone with half of a batch would have gone elsewhere.
    half = Recipe(lr=1e-2, coef_lr=1.0, epochs=2, batch_size=4, seed=3)
    lone = state(run(pairs_of(tmp_path), tmp_path / "half", half, Small(0.0)).model)
    assert not torch.allclose(lone["words.weight"], both["words.weight"], rtol=1e-3, atol=1e-5)
