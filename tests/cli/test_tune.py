"""``vidtok tune``: the measuring loop with a fake timer, the calls it times, the file it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Said
from vidtok.cli import calls
from vidtok.kernels import tables
from vidtok.kernels.select import use_backend
from vidtok.kernels.tables import _files
from vidtok.kernels.tables.tuning import MOST, Measured, Task, measure, merged, picked, spearman

SM = 80
GPU = tables.GPUS[SM]
ABOUT = {"gpu": "a card", "versions": {"vidtok": "0"}}


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("VIDTOK_TUNING", str(path))
    tables.reload()
    yield path
    tables.reload()


class Card:
    """A stand-in for a GPU: its calls ask for knobs as kernels do, its timer gives seconds made from them."""

    def __init__(self, seconds: Callable[[str, str, Mapping[str, int], str, dict[str, int]], float]) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, 0
        self.backend = ""

    def using(self, backend: str) -> Any:
        from contextlib import nullcontext

        self.backend = backend
        return nullcontext()

    def make(self, op: str, shape: Mapping[str, int], dtype: str) -> Callable[[], float]:
        def call() -> float:
            return self.seconds(self.backend, op, shape, dtype, tables.choose(self.backend, op, SM, dtype, shape))

        return call

    def timer(self, call: Callable[[], Any]) -> float:
        self.now += 0.1
        self.calls += 1
        return call()

    def clock(self) -> float:
        return self.now

    def measure(self, tasks: list[Task], seconds: float = 1e6, **more: Any) -> Measured:
        return measure(
            tasks, SM, "measured on a card", self.timer, self.make, seconds, using=self.using, clock=self.clock, **more
        )


def modelled(backend: str, op: str, shape: Mapping[str, int], dtype: str, knobs: dict[str, int]) -> float:
    return tables.module(op).seconds(backend, GPU, dtype, shape, knobs)


def upside_down(*call: Any) -> float:
    return 1e-9 / modelled(*call)


TASKS = [Task(backend, op, ("float32",)) for backend in tables.BACKENDS for op in tables.OPERATORS]


def test_a_card_like_the_model() -> None:
    done = Card(modelled).measure(TASKS)
    assert not done.failed and not done.left
    found = done.correlation()
    for backend in tables.BACKENDS:
        assert set(found[backend]) == set(tables.OPERATORS)
        for op, numbers in found[backend].items():
            assert numbers["spearman"] == pytest.approx(1), op
            assert numbers["candidates"] <= MOST[backend] * 2 * len(tables.module(op).SHAPES)
    # Nothing is gained over the model's choice, so the tables stay what they were.
    before = _files.shipped(SM)
    for at, entry in done.table.entries.items():
        assert entry.knobs == before.entries[at].knobs and entry.source == "measured on a card"
    assert done.table.frozen and all(g == pytest.approx(1, rel=0.02) for gains in done.gains.values() for g in gains)
    assert {(b, o) for b, o, *_ in done.table.entries} == {(t.backend, t.op) for t in TASKS}


def test_a_card_unlike_the_model(user: Path) -> None:
    card = Card(upside_down)
    done = card.measure(TASKS)
    for backend in tables.BACKENDS:
        for op, numbers in done.correlation()[backend].items():
            assert numbers["spearman"] == pytest.approx(-1), op
    _files.write(user, merged(_files.read_user(user), SM, ABOUT, done))
    tables.reload()
    changed = 0
    for task in TASKS:
        for shape in tables.shapes(task.op, "float32"):
            found = tables.entry(task.backend, task.op, SM, "float32", shape)
            assert found.source == "measured on a card"
            changed += (
                found.knobs
                != _files.shipped(SM)
                .entries[_files.key(task.backend, task.op, "float32", tables.module(task.op).bucket(shape))]
                .knobs
            )
    assert changed > len(TASKS)
    # What changes bits is the same for every batch size.
    shape = {"length": 8192, "q_heads": 28, "kv_heads": 4, "dim": 128}
    chosen = [tables.choose("cuda", "attention_topk", SM, "float32", {**shape, "rows": n}) for n in (1, 3, 16, 200)]
    assert len({tuple(k.items()) for k in chosen}) == 1


def test_bits_may_be_kept() -> None:
    done = Card(upside_down).measure(TASKS, keep_bits=True)
    assert not done.table.frozen
    before = _files.shipped(SM)
    for (backend, op, *rest), entry in done.table.entries.items():
        for name in tables.module(op).BITS[backend]:
            assert entry.knobs[name] == before.entries[(backend, op, *rest)].knobs[name]


def test_time_limit_is_shared() -> None:
    card = Card(modelled)
    done = card.measure(TASKS, seconds=30.0)
    # Each of 18 kernels gets its share: some candidates of each were measured, and the limit holds.
    assert card.now < 33 and not done.left
    assert {(b, o) for b, o, *_ in done.table.entries} == {(t.backend, t.op) for t in TASKS}
    card = Card(modelled)
    done = card.measure(TASKS, seconds=0.15)
    assert card.now <= 0.5 and done.left


class Refused(Exception):
    """Triton's errors, such as OutOfResources, are plain exceptions."""


def test_a_candidate_that_fails_is_passed_over() -> None:
    def seconds(*call: Any) -> float:
        if call[-1].get("threads") == 128:
            raise Refused("launch\n failed")
        return modelled(*call)

    done = Card(seconds).measure([Task("cuda", "plan_apply", ("float32",))])
    assert done.table.entries and all(e.knobs["threads"] != 128 for e in done.table.entries.values())
    assert done.failed and "launch failed" in done.failed[0] and "'threads': 128" in done.failed[0]


def test_a_call_that_the_reference_serves_tells_nothing() -> None:
    card = Card(modelled)
    card.make = lambda op, shape, dtype: lambda: 1.0  # type: ignore[method-assign]
    done = card.measure([Task("cuda", "plan_apply", ("float32",))])
    assert not done.table.entries and not done.ranks and "the reference served it" in done.failed[0]


def test_half_precisions_share_a_measurement() -> None:
    done = Card(modelled).measure([Task("cuda", "plan_apply", ("bfloat16", "float16"))])
    sources = {at[2]: entry.source for at, entry in done.table.entries.items()}
    assert sources == {"bfloat16": "measured on a card", "float16": "measured on a card in bfloat16"}


def test_file_keeps_what_is_not_measured(user: Path) -> None:
    saved: list[int] = []

    def save(done: Measured) -> None:
        _files.write(user, merged(_files.read_user(user), SM, ABOUT, done))
        saved.append(len(json.loads(user.read_text())["gpus"]["80"]["entries"]))

    first = _files.read_user(user)
    first["gpus"]["90"] = {"gpu": "another", "frozen": [], "entries": []}
    _files.write(user, first)
    Card(upside_down).measure([Task("cuda", "plan_apply", ("float32",))], save=save)
    Card(modelled).measure([Task("cuda", "attention_topk", ("float32",))], save=save)
    found = json.loads(user.read_text())
    assert set(found["gpus"]) == {"80", "90"} and found["gpus"]["90"]["gpu"] == "another"
    mine = found["gpus"]["80"]
    assert mine["gpu"] == "a card" and mine["versions"] == {"vidtok": "0"}
    assert set(mine["correlation"]["cuda"]) == {"plan_apply", "attention_topk"} and saved[0] < saved[1]
    assert {line["op"] for line in mine["entries"]} == {"plan_apply", "attention_topk"}
    assert all(line["microseconds"] > 0 for line in mine["entries"])
    # New frozen knobs put entries of the old ones out of the file.
    Card(upside_down).measure([Task("cuda", "attention_topk", ("float32",))], save=save)
    table = _files.parse(json.loads(user.read_text())["gpus"]["80"], SM)
    for (backend, op, dtype, *bucket), entry in table.entries.items():
        fixed = table.frozen.get(_files.key(backend, op, dtype, tables.module(op).frozen(dict(bucket))))
        assert fixed is None or fixed.knobs.items() <= entry.knobs.items()


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 0 1 2 3 against 1 0 3 2: 1 - 6·4 / (4·15).
    assert spearman([1, 2, 3, 4], [2, 1, 9, 5]) == pytest.approx(0.6)
    # A tie takes the mean rank: 0.5 0.5 2 against 0 1 2.
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75**0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) != spearman([1, 1, 1], [1, 2, 3])
    torch.manual_seed(0)
    a, b = torch.rand(50), torch.rand(50)
    wanted = torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).float())[0, 1]
    assert spearman(a.tolist(), b.tolist()) == pytest.approx(wanted.item(), abs=1e-5)


def test_picked() -> None:
    assert picked([1, 2, 3], 8) == [1, 2, 3]
    some = picked(list(range(100)), 8)
    assert some[:4] == [0, 1, 2, 3] and len(some) == 8 == len(set(some)) and some == sorted(some) and some[-1] > 85


SMALL = {
    "adjacent_similarity": {"tokens": 64, "channels": 8},
    "attention_topk": {"length": 40, "q_heads": 4, "kv_heads": 2, "dim": 8, "rows": 3},
    "bipartite": {"batch": 2, "tokens": 16, "dim": 8, "channels": 16, "heads": 3},
    "cluster_dpc_knn": {"segments": 2, "longest": 20, "channels": 8},
    "contour_select": {"sequences": 2, "longest": 32, "rank": 4, "channels": 8},
    "plan_apply": {"rows": 32, "channels": 8, "itemsize": 4},
    "pool_packed": {"rows": 256, "channels": 8, "itemsize": 4},
    "position_remap": {"rows": 16, "tensors": 4, "bytes": 64},
    "topk_select": {"segments": 2, "longest": 32},
}


@pytest.mark.parametrize("op", tables.OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_run(op: str, dtype: torch.dtype) -> None:
    assert set(SMALL[op]) == set(tables.module(op).SHAPE)
    with use_backend("reference"):
        call = calls.build(op, SMALL[op], dtype, "cpu")
        first, again = call(), call()
    out = first if isinstance(first, torch.Tensor) else first[0]
    twin = again if isinstance(again, torch.Tensor) else again[0]
    assert out.numel() > 0 and torch.equal(out, twin)
    if op in ("plan_apply", "pool_packed"):
        assert out.shape == (SMALL[op]["rows"], SMALL[op]["channels"])
    if op == "position_remap":
        assert sum(t.shape[0] for t in first) * 8 == SMALL[op]["bytes"] and len(first) == SMALL[op]["tensors"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu(call: Callable[..., Said], user: Path) -> None:
    said = call("tune")
    assert said == (2, "", "vidtok: expected a GPU that torch can use, got none\n")
    assert not user.exists()


def test_help(call: Callable[..., Said]) -> None:
    said = call("tune", "--help")
    assert said.code == 0 and all(word in said.out for word in ("--minutes", "--out", "--operator", "--keep-bits"))
