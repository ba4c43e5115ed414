"""``vidtok doctor`` speaks on good and on broken installs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vidtok
from tests.cli.conftest import spawn

RAISES = "raise OSError('cannot open shared object file')"
CRASHES = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
ABSENT = "raise ModuleNotFoundError('No module named typer')"
STUBS = [
    {"torch": RAISES, "typer": ABSENT, "decord": CRASHES},
    {"torch": CRASHES, "rich": RAISES, "jinja2": RAISES},
]


def environment(*first: Path | str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, first), *filter(None, sys.path)])}


def test_good_install() -> None:
    done = spawn("doctor", env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (vidtok.__version__, "torch", "transformers", "threads", "avx2", "operators", "plan_apply", "all well"):
        assert word in done.stdout, word
    from vidtok.kernels import select

    for operator, backend, reason in select.report():
        assert any(line.split()[:2] == [operator, f"{backend}:"] for line in done.stdout.splitlines()), operator
        assert " ".join(reason.split())[:60] in done.stdout


@pytest.mark.parametrize("stubs", STUBS)
def test_broken_packages(stubs: dict[str, str], tmp_path: Path) -> None:
    for package, body in stubs.items():
        (tmp_path / f"{package}.py").write_text(body + "\n")
    done = spawn("doctor", env=environment(tmp_path))
    assert "Traceback" not in done.stdout + done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for package, body in stubs.items():
        assert "does not import" in lines[package]
        assert ("signal 11" in lines[package]) == (body == CRASHES)
        problem = f"{package} is installed and does not import"
        assert (problem in done.stdout) == (package != "decord")
    assert done.returncode == 1 and "operators do not load" in done.stdout
    for word in ("processor", "extension", "result", "python"):
        assert word in lines


def test_optional_packages_are_no_problem(tmp_path: Path) -> None:
    for package in ("decord", "av"):
        (tmp_path / f"{package}.py").write_text(CRASHES + "\n")
    done = spawn("doctor", env=environment(tmp_path))
    assert done.returncode == 0 and done.stdout.count("signal 11") == 2


def test_broken_extension(tmp_path: Path) -> None:
    """A copy of the package whose extension is garbage falls back and says why."""
    source = Path(vidtok.__file__).parent
    copy = tmp_path / "vidtok"
    for path in source.rglob("*"):
        if path.suffix in (".py", ".j2") and "__pycache__" not in path.parts:
            target = copy / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    import sysconfig

    (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF garbage")
    done = spawn("doctor", env=environment(tmp_path))
    assert "Traceback" not in done.stdout + done.stderr and str(tmp_path) in done.stdout
    assert any(line.split()[:2] == ["plan_apply", "reference:"] for line in done.stdout.splitlines()), done.stdout
    # The kernels themselves broken.
    (copy / "kernels" / "select.py").write_text("raise RuntimeError('no kernels today')\n")
    done = spawn("doctor", env=environment(tmp_path))
    assert done.returncode == 1 and "no kernels today" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_needs_only_the_standard_library() -> None:
    code = "import sys; import vidtok.cli.doctor; print([m for m in ('torch', 'typer', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


GPU = {
    "name": "A card",
    "sm": 90,
    "rows": [
        ["plan_apply", "triton", "serves cuda:0", {"cuda": "Can't run plan_apply on the cuda backend; it is missing.",
                                                   "triton": None}],
        ["pool_packed", "cuda", "serves cuda:0", {"cuda": None, "triton": None}],
    ],
}  # fmt: skip


def test_gpu_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says where a GPU and a CUDA binary are."""
    from vidtok.cli import doctor
    from vidtok.kernels import tables

    monkeypatch.setenv("VIDTOK_TUNING", "off")
    tables.reload()
    found = {
        "gpus": [GPU],
        "cuda": {"host": False, "sms": [80, 90], "ptx": [90], "compiler": "nvcc 13.0"},
    }
    doctor._gpu(found)
    doctor._tables(found, None)
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "cuda holds sm_80, sm_90; PTX: compute_90 (nvcc 13.0)" in lines
    assert "operators on cuda:0, A card, sm_90" in lines
    assert "plan_apply triton: serves cuda:0" in lines and "passed over cuda: it is missing." in lines
    assert "pool_packed cuda: serves cuda:0; can: cuda, triton" in lines
    assert "user table none: VIDTOK_TUNING=off" in lines
    for op in tables.OPERATORS:
        for backend in tables.BACKENDS:
            mine = [line for line in lines if line.startswith(f"{op} {backend} ")]
            assert len(mine) == 1 and "modelled" in mine[0] and "limit" in mine[0], op


def test_tables_of_an_sm() -> None:
    from vidtok.kernels import tables

    done = spawn("doctor", "--sm", "80", env={**environment(), "VIDTOK_TUNING": "off"})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for backend in tables.BACKENDS:
        for op in tables.OPERATORS:
            for dtype in tables.dtypes(op, 80):
                for shape in tables.shapes(op, dtype):
                    entry = tables.entry(backend, op, 80, dtype, shape)
                    extents = " ".join(f"{k}={v}" for k, v in shape.items())
                    knobs = " ".join(f"{k}={v}" for k, v in entry.knobs.items())
                    assert f"{op} {backend} {dtype} {extents}: {knobs}; {entry.source}; limit {entry.limit}" in lines
    assert spawn("doctor", env={**environment(), "VIDTOK_TUNING": "off"}).stdout.count("lists them") == len(tables.GPUS)
    done = spawn("doctor", "--sm", "61", env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "vidtok: expected an SM of at least 70, got 61\n")


def test_report_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidtok.kernels import select

    why: dict[tuple[str, str], str | None] = {("cuda", "plan_apply"): "no cuda", ("triton", "topk_select"): "no triton"}
    monkeypatch.setattr(select, "_gpu_obstacle", lambda backend, operator, device: why.get((backend, operator)))
    monkeypatch.setattr(select.state, "requested", "auto")
    rows = {row.operator: row for row in select.report(0)}
    assert rows["plan_apply"].backend == "triton" and rows["topk_select"].backend == "cuda"
    assert rows["pool_packed"] == ("pool_packed", "cuda", "serves cuda:0")
    monkeypatch.setattr(select.state, "requested", "triton")
    rows = {row.operator: row for row in select.report(0)}
    assert rows["topk_select"] == ("topk_select", "reference", "no triton")
    assert rows["pool_packed"].backend == "triton"
    monkeypatch.setattr(select.state, "requested", "reference")
    assert {row.backend for row in select.report(0)} == {"reference"}
