"""Tables of GPU kernels' knobs: the model, what it depends on, the shipped files and the user's."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vidtok.kernels import tables
from vidtok.kernels.tables import GPUS, Gpu, _files, _model
from vidtok.kernels.tables import __main__ as write
from vidtok.kernels.tables.gpus import nearest, occupancy

EVERY = [
    (sm, backend, op) for sm in GPUS for backend in tables.backends(sm) for op in tables.OPERATORS
]  # fmt: skip
SERVED = [(backend, op) for backend in tables.BACKENDS for op in tables.OPERATORS]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDTOK_TUNING", "off")
    tables.reload()
    yield
    tables.reload()


@pytest.mark.parametrize("sm,backend,op", EVERY)
def test_every_entry_fits(sm: int, backend: str, op: str) -> None:
    gpu, own = GPUS[sm], tables.module(op)
    for dtype in tables.dtypes(op, sm):
        for shape in tables.shapes(op, dtype):
            found = tables.entry(backend, op, sm, dtype, shape)
            assert found.source == "modelled" and found.seconds > gpu.launch
            assert set(found.knobs) == set(own.KNOBS[backend])
            works = own.works(backend, gpu, dtype, own.bucket(shape), found.knobs)
            for work in works:
                assert work.shared <= gpu.shared_block
                blocks, _ = occupancy(gpu, work.threads, work.registers, work.shared)
                assert blocks >= 1 and blocks * work.threads <= gpu.threads_sm
                assert blocks * work.threads * work.registers <= gpu.registers_sm
            assert any(char.isdigit() for char in found.limit)
            assert tables.choose(backend, op, sm, dtype, shape) == found.knobs


@pytest.mark.parametrize("sm,backend,op", EVERY)
def test_every_candidate_says_why(sm: int, backend: str, op: str) -> None:
    gpu, own = GPUS[sm], tables.module(op)
    for dtype in tables.dtypes(op, sm):
        for shape in tables.shapes(op, dtype):
            listed = own.candidates(backend, gpu, dtype, shape)
            assert [c.knobs for c in listed] == list(_model.spread(own.KNOBS[backend]))
            for candidate in listed:
                seconds = own.seconds(backend, gpu, dtype, shape, candidate.knobs)
                if candidate.rejected is None:
                    assert gpu.launch < seconds < 1 and candidate.limit
                else:
                    assert any(char.isdigit() for char in candidate.rejected), candidate.rejected
                    assert not candidate.limit
            assert any(c.rejected is None for c in listed)


def test_some_candidates_are_ruled_out() -> None:
    """Negative control of the above: small shared memory, few registers and missing cp.async rule some out."""
    shape = {"segments": 32, "longest": 256, "channels": 4096}
    own = tables.module("cluster_dpc_knn")
    why = {
        sm: {tuple(c.knobs.values()): c.rejected for c in own.candidates("cuda", gpu, "float16", shape)}
        for sm, gpu in GPUS.items()
    }
    large = (128, 8, 4)
    assert why[90][large] is None and why[80][large] is None
    for sm in (86, 89):
        assert f"sm_{sm} has {99 * 1024}" in str(why[sm][large]) and "132352 bytes" in str(why[sm][large])
    assert "cp.async" in str(why[70][large]) and "2 at most" in str(why[70][large])
    assert "made by 8 warps, not 4" in str(why[90][(128, 4, 2)])
    triton = own.candidates("triton", GPUS[90], "float16", shape)
    wide = [c.rejected for c in triton if c.knobs["tile"] == 128 and c.knobs["num_warps"] == 2]
    assert wide and all("registers per thread" in str(text) for text in wide)
    long = {"batch": 8, "tokens": 8192, "dim": 64, "channels": 1024, "heads": 1}
    one = tables.module("bipartite").candidates("cuda", GPUS[86], "float16", long)
    assert "bytes of shared memory per block, sm_86 has 101376" in str(
        next(c.rejected for c in one if c.knobs == {"one_block": 1, "tile": 64})
    )


def test_no_bfloat16_on_sm70() -> None:
    with pytest.raises(ValueError, match="sm_70 has no bfloat16"):
        tables.choose("cuda", "plan_apply", 70, "bfloat16", {"rows": 64, "channels": 64, "itemsize": 2})


def changed(name: str, factor: float) -> Gpu:
    gpu = GPUS[80]
    if name == "shared":
        return replace(gpu, shared_block=int(gpu.shared_block * factor), shared_sm=int(gpu.shared_sm * factor))
    value = getattr(gpu, name) * factor
    return replace(gpu, **{name: int(value) if isinstance(getattr(gpu, name), int) else value})


@pytest.mark.parametrize(
    "name,factor,operators",
    [
        ("sms", 0.25, {"attention_topk", "contour_select", "pool_packed", "position_remap", "topk_select"}),
        ("sms", 2, {"adjacent_similarity", "bipartite", "cluster_dpc_knn", "plan_apply"}),
        ("shared", 0.5, {"adjacent_similarity", "attention_topk", "bipartite", "cluster_dpc_knn", "topk_select"}),
        ("registers_sm", 0.5, {"adjacent_similarity", "bipartite", "cluster_dpc_knn", "plan_apply", "topk_select"}),
        ("bandwidth", 0.25, {"attention_topk", "bipartite", "cluster_dpc_knn", "plan_apply", "pool_packed"}),
        ("tensor16", 0.25, {"bipartite", "cluster_dpc_knn"}),
        ("fp32", 4, {"bipartite", "cluster_dpc_knn", "contour_select"}),
    ],
)
def test_entries_follow_their_inputs(name: str, factor: float, operators: set[str]) -> None:
    other = changed(name, factor)
    seen = set()
    for op in tables.OPERATORS:
        for dtype in ("float16", "float32"):
            for shape in tables.shapes(op, dtype):
                before = tables.resolve("cuda", op, GPUS[80], dtype, shape)
                # The same inputs give the same answer: nothing but them is read.
                assert tables.resolve("cuda", op, replace(GPUS[80]), dtype, shape) == before
                if tables.resolve("cuda", op, other, dtype, shape).knobs != before.knobs:
                    seen.add(op)
    assert operators <= seen


def test_a_gpu_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no candidate .* needs \d+ bytes of shared memory per block, sm_80 has \d+"):
        tables.resolve(
            "cuda", "attention_topk", changed("shared", 0.01), "float16", tables.shapes("attention_topk", "float16")[0]
        )


def test_occupancy() -> None:
    gpu = GPUS[80]
    assert occupancy(gpu, 256, 32, 0) == (8, "threads")
    assert occupancy(gpu, 32, 32, 0) == (32, "blocks")
    assert occupancy(gpu, 256, 128, 0) == (2, "registers")
    assert occupancy(gpu, 128, 32, 81 * 1024) == (2, "shared memory")
    # 82 KiB and the system's 1 KiB twice are more than 164 KiB.
    assert occupancy(gpu, 128, 32, 82 * 1024) == (1, "shared memory")
    assert occupancy(GPUS[70], 128, 32, 48 * 1024) == (2, "shared memory")
    assert occupancy(gpu, 128, 32, gpu.shared_block + 1)[0] == 0 and occupancy(gpu, 128, 256, 0)[0] == 0
    assert occupancy(GPUS[86], 1024, 32, 0) == (1, "threads")
    assert {sm: g.shared_block // 1024 for sm, g in GPUS.items()} == {70: 96, 80: 163, 86: 99, 89: 99, 90: 227}


def test_model_by_hand() -> None:
    """One wave that memory limits: launch + bytes / bandwidth; half the bytes in flight, twice that time."""
    gpu = replace(GPUS[80], launch=1e-6, bandwidth=1e12, sms=100)
    threads = 1e12 * _model.LATENCY / 16 / 100
    work = _model.Work(blocks=100, threads=1024, registers=16, shared=0, bytes=1e9, flight=16 * threads / 1024)
    assert _model.launch_seconds(gpu, work) == pytest.approx(1e-6 + 1e-3)
    assert _model.launch_seconds(gpu, replace(work, flight=work.flight / 2)) == pytest.approx(1e-6 + 2e-3)
    # Arithmetic of the fullest SM: 101 blocks on 100 SMs take as long as 200.
    tile = _model.Work(blocks=101, threads=1024, registers=16, shared=0, bytes=0, flight=1, flops=101e9)
    assert _model.launch_seconds(gpu, tile) == pytest.approx(1e-6 + 2 * 1e9 / (gpu.fp32 / 100))
    # In series beside it: of the shorter, half shows where two blocks share an SM, all where one is alone.
    arithmetic = 1e9 / (gpu.fp32 / 100)
    both = replace(tile, chain=0.1)
    assert _model.launch_seconds(gpu, both) == pytest.approx(1e-6 + 0.1 + 2 * arithmetic / 2)
    alone = replace(both, blocks=100, flops=100e9)
    assert _model.launch_seconds(gpu, alone) == pytest.approx(1e-6 + 0.1 + arithmetic)
    assert _model.launch_seconds(gpu, replace(both, chain=1e-4)) == pytest.approx(1e-6 + 2 * arithmetic + 0.5e-4)
    # Two hundred blocks fit at once; the rest are a second wave.
    more = replace(tile, blocks=250, flops=250e9)
    assert _model.launch_seconds(gpu, more) == pytest.approx(1e-6 + 3 * arithmetic)


@pytest.mark.parametrize("backend,op", SERVED)
def test_knobs_that_change_bits(backend: str, op: str) -> None:
    """They depend on dtype, the reduced extent and the SM, whatever the other extents are."""
    own, bits = tables.module(op), tables.module(op).BITS[backend]
    free = {
        "adjacent_similarity": ["tokens"],
        "attention_topk": ["rows"],
        "bipartite": ["batch", "tokens", "channels", "heads"] if backend == "triton" else [],
        "cluster_dpc_knn": ["segments", "longest"] if backend == "triton" else [],
        "contour_select": ["sequences", "longest"],
    }
    assert bool(bits) == bool(free.get(op))
    for dtype in ("float32", "float16"):
        for shape in tables.shapes(op, dtype) if bits else []:
            wanted = tables.choose(backend, op, 80, dtype, shape)
            for name in free[op]:
                for value in (1, 7, 100, 4000):
                    other = tables.choose(backend, op, 80, dtype, {**shape, name: value})
                    assert {n: other[n] for n in bits} == {n: wanted[n] for n in bits}, (name, value)
    if op == "bipartite" and backend == "cuda":
        assert len({tables.choose(backend, op, 80, "float16", s)["tile"] for s in own.SHAPES}) > 1


def test_odd_shapes_have_entries() -> None:
    """No call is refused for its shape: something fits on every SM."""
    for sm, backend, op in EVERY:
        for value in (0, 1, 3, 600, 1 << 20):
            shape = dict.fromkeys(tables.module(op).SHAPE, value)
            shape.update({n: max(1, min(value, 512)) for n in ("q_heads", "kv_heads", "dim", "rank") if n in shape})
            for dtype in tables.dtypes(op, sm):
                shape.update({n: 4 if dtype == "float32" else 2 for n in ("itemsize",) if n in shape})
                assert tables.choose(backend, op, sm, dtype, shape)


def test_names_are_checked() -> None:
    shape = {"rows": 64, "channels": 64, "itemsize": 2}
    for call, words in (
        (("cuda", "nothing", 80, "float16", shape), "an operator among"),
        (("rocm", "plan_apply", 80, "float16", shape), "a backend among"),
        (("cuda", "plan_apply", 80, "float64", shape), "a dtype among"),
        (("cuda", "plan_apply", 80, "float16", {"rows": 64}), "the extents rows, channels, itemsize"),
        (("cuda", "plan_apply", 61, "float16", shape), "an SM of at least 70"),
    ):
        with pytest.raises(ValueError, match=words):
            tables.choose(*call)
    assert [nearest(sm) for sm in (70, 75, 80, 86, 87, 89, 90, 100, 103, 120)] == [
        70,
        70,
        80,
        86,
        86,
        89,
        90,
        90,
        90,
        89,
    ]


def test_shipped_files_are_in_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write.main(["--check"]) == 0
    assert write.main([], folder=tmp_path) == 0 and len(list(tmp_path.iterdir())) == len(GPUS)
    assert write.main(["--check"], folder=tmp_path) == 0
    path = tmp_path / "sm86.json"
    path.write_text(path.read_text().replace('"threads": 128', '"threads": 256', 1))
    assert write.main(["--check"], folder=tmp_path) == 1
    assert "sm86.json is out of step" in capsys.readouterr().err


def test_shipped_entries_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape that tables hold is answered from a file: the model is not asked."""
    monkeypatch.setattr(tables, "fastest", None)
    for sm, backend, op in EVERY:
        for dtype in tables.dtypes(op, sm):
            for shape in tables.shapes(op, dtype):
                assert tables.entry(backend, op, sm, dtype, shape).source == "modelled"


SHAPE = {"rows": 8192, "channels": 4096, "itemsize": 2}
DPC = {"segments": 32, "longest": 256, "channels": 4096}
ATTENTION = {"length": 8192, "q_heads": 28, "kv_heads": 4, "dim": 128, "rows": 1}


def line(op: str, shape: dict[str, int], knobs: dict[str, int]) -> dict[str, object]:
    return {
        "backend": "cuda",
        "op": op,
        "dtypes": ["float16"],
        "bucket": shape,
        "knobs": knobs,
        "source": "measured on a card",
        "microseconds": 1.5,
        "limit": "",
    }


def tuned(entries: list[object], frozen: list[object] | None = None, sm: int = 80) -> dict[str, object]:
    return {"format": 1, "gpus": {str(sm): {"gpu": "a card", "frozen": frozen or [], "entries": entries}}}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("VIDTOK_TUNING", str(path))
    tables.reload()
    return path


def test_user_table_overrides(user: Path) -> None:
    before = tables.choose("cuda", "plan_apply", 80, "float16", SHAPE)
    mine = {"threads": 512, "vectors": 1}
    assert before != mine
    user.write_text(json.dumps(tuned([line("plan_apply", SHAPE, mine)])))
    tables.reload()
    found = tables.entry("cuda", "plan_apply", 80, "float16", {"rows": 8000, "channels": 3584, "itemsize": 2})
    assert found.knobs == mine and found.source == "measured on a card" and found.seconds == pytest.approx(1.5e-6)
    # Not for another SM, dtype or shape.
    assert tables.choose("cuda", "plan_apply", 86, "float16", SHAPE) != mine
    assert tables.choose("cuda", "plan_apply", 80, "bfloat16", SHAPE) == before
    assert tables.entry("cuda", "plan_apply", 80, "float16", {**SHAPE, "rows": 64}).source == "modelled"


def test_user_table_keeps_bits_together(user: Path) -> None:
    """Knobs that change bits come from frozen lines alone, the same for every number of rows."""
    before = tables.choose("cuda", "attention_topk", 80, "float16", ATTENTION)
    mine = {"split": 1024, "warps": 2}
    assert before["split"] != 1024
    user.write_text(json.dumps(tuned([line("attention_topk", ATTENTION, mine)])))
    tables.reload()
    assert tables.choose("cuda", "attention_topk", 80, "float16", ATTENTION) == before
    frozen = line("attention_topk", ATTENTION, mine)
    user.write_text(json.dumps(tuned([line("attention_topk", ATTENTION, mine)], [frozen])))
    tables.reload()
    for rows in (1, 16, 64):
        found = tables.entry("cuda", "attention_topk", 80, "float16", {**ATTENTION, "rows": rows})
        assert found.knobs == mine and "measured on a card" in found.source


@pytest.mark.parametrize(
    "text,words",
    [
        ("{", "Expecting property name"),
        ("[]", "a tuning file of format 1"),
        ('{"format": 2, "gpus": {}}', "a tuning file of format 1"),
        ('{"format": 1, "gpus": {"80": 7}}', "a table for sm_80, got int"),
        ('{"format": 1, "gpus": {"80": {"frozen": [], "entries": 3}}}', "a list of entries"),
        ('{"format": 1, "gpus": {"80": {"frozen": [], "entries": [4]}}}', "a line of entries, got 4"),
        (json.dumps(tuned([line("plan_apply", SHAPE, {"threads": 100, "vectors": 1})])), "expected the knobs"),
        (json.dumps(tuned([line("plan_apply", {"rows": 1}, {"threads": 128, "vectors": 1})])), "expected a bucket"),
        (json.dumps(tuned([line("nothing", SHAPE, {})])), "expected a backend and an operator"),
        (
            json.dumps(tuned([line("cluster_dpc_knn", DPC, {"tile": 128, "warps": 8, "stages": 4})], sm=86)),
            "does not fit",
        ),
    ],
)
def test_corrupt_user_table(user: Path, caplog: pytest.LogCaptureFixture, text: str, words: str) -> None:
    user.write_text(text)
    tables.reload()
    sm = 86 if '"86"' in text else 80
    with caplog.at_level(logging.WARNING, logger="vidtok"):
        for _ in range(2):
            assert tables.entry("cuda", "plan_apply", sm, "float16", SHAPE).source == "modelled"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "\n" not in said[0]
    assert str(user) in said[0] and "is ignored" in said[0] and words in said[0]


def test_where_the_user_table_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _files.user_path() is None
    monkeypatch.setenv("VIDTOK_TUNING", str(tmp_path / "a.json"))
    assert _files.user_path() == tmp_path / "a.json"
    monkeypatch.delenv("VIDTOK_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _files.user_path() == tmp_path / "vidtok" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.user_path() == tmp_path / ".cache" / "vidtok" / "tuning.json"


def test_adopted_lines_stay(tmp_path: Path, user: Path) -> None:
    mine = {"split": 1024, "warps": 2}
    frozen = line("attention_topk", ATTENTION, mine)
    user.write_text(json.dumps(tuned([line("attention_topk", ATTENTION, mine)], [frozen])))
    assert write.main(["--adopt", str(user)], folder=tmp_path) == 0
    table = _files.parse(json.loads((tmp_path / "sm80.json").read_text()), 80)
    at = _files.key("cuda", "attention_topk", "float16", ATTENTION)
    assert table.entries[at].knobs == mine and table.frozen[at].source == "measured on a card"
    other = _files.key("cuda", "attention_topk", "float16", {**ATTENTION, "rows": 16})
    assert table.entries[other].knobs == mine and table.entries[other].source.startswith("modelled, split and warps")
    # A second run, without the file, keeps them; the check agrees.
    assert write.main([], folder=tmp_path) == 0
    assert _files.parse(json.loads((tmp_path / "sm80.json").read_text()), 80).entries[at].knobs == mine
    assert write.main(["--check"], folder=tmp_path) == 0


def test_writing_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.json"
    _files.write(path, {"format": 1, "gpus": {}})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        _files.write(path, {"format": 1, "gpus": {"80": {"entries": [object()]}}})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_forced() -> None:
    mine = {"threads": 1024, "vectors": 1}
    before = tables.choose("cuda", "plan_apply", 80, "float16", SHAPE)
    with tables.forced("cuda", "plan_apply", mine):
        assert tables.choose("cuda", "plan_apply", 80, "float16", SHAPE) == mine
        with tables.forced("cuda", "plan_apply", before):
            assert tables.choose("cuda", "plan_apply", 80, "float16", SHAPE) == before
        assert tables.choose("cuda", "plan_apply", 80, "float16", SHAPE) == mine
    assert tables.choose("cuda", "plan_apply", 80, "float16", SHAPE) == before


def test_imports_no_torch() -> None:
    code = (
        "import sys; from vidtok.kernels import tables; "
        "tables.choose('cuda', 'topk_select', 80, 'float32', {'segments': 3, 'longest': 100}); "
        "print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "python"}
    )
    assert done.stdout.strip() == "[]"


def test_shapes_of_one_line_are_answered_by_one_look(monkeypatch):
    """The model may take a millisecond; counts that depend on data differ from call to call."""
    asked, original = [], tables.entry
    monkeypatch.setattr(tables, "entry", lambda *a: asked.append(a) or original(*a))
    tables._chosen.clear()
    first = {"segments": 40, "longest": 196, "channels": 3584}
    shapes = [{**first, "longest": n} for n in range(190, 256)]
    got = [tables.choose("cuda", "cluster_dpc_knn", 90, "bfloat16", shape) for shape in shapes]
    assert len(asked) == 1
    assert got == [original("cuda", "cluster_dpc_knn", 90, "bfloat16", shape).knobs for shape in shapes]
