"""Building and installing, in the ways people do."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging.envs import ROOT, Venv, call

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(900)]

WORKS = """
import torch, vidtok
from vidtok.kernels import select
assert select.build_info()["extension"], select.build_info()
index = vidtok.ops.topk_select(torch.tensor([1.0, 3.0, 2.0]), 2, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
assert index.tolist() == [1, 2], index
print(vidtok.__file__)
"""


def test_second_isolated_install_over_the_first(tree: Path, venv: Venv) -> None:
    # pip builds in the tree: the ninja of the first build is gone at the second, and a module deleted in between
    # must not come back from its leftovers.
    leftover = tree / "python/vidtok/leftover.py"
    leftover.write_text("")
    find = "import importlib.util as u; print(u.find_spec('vidtok.leftover'))"
    venv.pip("install", "--no-deps", "--force-reinstall", tree)
    assert str(venv.python.parents[1]) in venv.run(WORKS)
    assert "leftover.py" in venv.run(find)
    leftover.unlink()
    venv.pip("install", "--no-deps", "--force-reinstall", tree)
    assert str(venv.python.parents[1]) in venv.run(WORKS)
    assert "None" in venv.run(find)


def test_without_isolation_with_this_environment(tree: Path, venv: Venv) -> None:
    for _ in range(2):
        venv.pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", tree)
        assert str(venv.python.parents[1]) in venv.run(WORKS)


def test_editable_install(tree: Path, venv: Venv) -> None:
    # Without nvcc, too: nothing is said of a failure.
    without = {"VIDTOK_NO_CUDA": "", "CUDACXX": "/nonexistent/nvcc"}
    said = venv.pip("install", "-vv", "--no-deps", "--no-build-isolation", "-e", tree, **without)
    assert "vidtok: no nvcc: the CPU part is built" in said
    assert not list(tree.rglob("_cuda*.so"))
    assert str(tree) in venv.run(WORKS)


SYSTEM_CMAKE = "/usr/bin/cmake"


@pytest.mark.skipif(not Path(SYSTEM_CMAKE).exists(), reason="no CMake of the system's own")
def test_with_the_systems_cmake_after_pypis(tree: Path, venv: Venv) -> None:
    venv.pip("install", "--no-deps", "--no-build-isolation", tree)
    venv.pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", tree, CMAKE_EXECUTABLE=SYSTEM_CMAKE)
    venv.run(WORKS)


def test_pybind11_headers_come_from_torch_when_its_package_is_missing(tree: Path, tmp_path: Path) -> None:
    # The build environment has setuptools and torch's files only, and torch cannot be imported.
    plain = Venv(tmp_path / "plain", borrow=False)
    plain.pip("install", f"setuptools=={__import__('setuptools').__version__}", "wheel")
    site = Path(plain.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    import torch

    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text("raise ImportError('the build imported torch')")
    (site / "torch/include").symlink_to(Path(torch.__file__).parent / "include")
    tools = {"CMAKE_EXECUTABLE": tool("cmake"), "VIDTOK_NINJA": tool("ninja")}
    plain.pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, **tools)
    assert list(tmp_path.glob("vidtok-*.whl"))


def tool(name: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.exists() else str(shutil.which(name))


def test_without_a_compiler_the_message_says_what_to_do(tree: Path, venv: Venv, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    said = venv.pip("install", "--no-deps", "--no-build-isolation", tree, ok=False, PATH=str(empty), CXX="")
    assert "expected a C++17 compiler" in said and "VIDTOK_NO_EXT=1" in said
    assert "Traceback" not in said.split("vidtok: expected")[0][-200:]

    venv.pip("install", "--no-deps", "--no-build-isolation", tree, PATH=str(empty), CXX="", VIDTOK_NO_EXT="1")
    said = venv.run("import vidtok; from vidtok import ops")
    assert said.count("compiled extension is missing") == 1


def test_sdist_wheel_and_the_tests_on_it(tree: Path, venv: Venv, tmp_path: Path) -> None:
    call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path / "dist", tree)
    (sdist,) = (tmp_path / "dist").glob("vidtok-*.tar.gz")
    call("tar", "xf", sdist, "-C", tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path / "dist", unpacked)
    (wheel,) = (tmp_path / "dist").glob("vidtok-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"vidtok/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert "vidtok/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "build")) or "libgomp" in n]
    in_tree = {p.relative_to(ROOT / "python").as_posix() for p in (ROOT / "python").rglob("*.py")}
    assert in_tree - set(names) == set()

    venv.pip("install", "--no-deps", wheel)
    venv.run(WORKS)
    assert "vidtok" in call(venv.python.parent / "vidtok", "--help", cwd=tmp_path)
    # The sdist's tests run against the installed wheel, not against its own python/.
    # The other instruction sets have their own run.
    best = venv.run("from vidtok.kernels import select; print(select.build_info()['isa'])").strip()
    run = (
        venv.python,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(os.cpu_count() or 1),
        "-o",
        "pythonpath=",
        "-p",
        "no:cacheprovider",
    )
    folders = ("tests/test_plan.py", "tests/test_spec.py", "tests/ops", "tests/methods", "tests/data")
    said = call(*run, "-m", "not slow", *folders, cwd=unpacked, OMP_NUM_THREADS="1", VIDTOK_CPU_ISA=best)
    assert " passed" in said and " failed" not in said


def other_pythons() -> list[str]:
    """Interpreters of the other supported versions, on PATH or under pyenv, that really run."""
    found = {}
    for minor in (10, 11, 12, 13):
        if minor == sys.version_info[1]:
            continue
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        for python in [shutil.which(f"python3.{minor}"), *sorted(map(str, pyenv.glob(f"3.{minor}.*/bin/python3")))]:
            if python and os.spawnl(os.P_WAIT, python, python, "-c", "import venv, ensurepip") == 0:
                found[minor] = python
                break
    return list(found.values())


# No torch here: a module loaded by its file, and a call that needs no tensor.
TORCH_FREE = """
import glob, importlib.util, sysconfig
(path,) = glob.glob(sysconfig.get_path("purelib") + "/vidtok/_C.*.so")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(n for n in dir(module) if not n.startswith("_")))
print(module.build_info())
"""


@pytest.mark.parametrize("python", other_pythons())
def test_other_pythons_build_and_load_the_extension(python: str, tree: Path, tmp_path: Path) -> None:
    other = Venv(tmp_path / "other", borrow=False, python=python)
    other.pip("install", "--no-deps", tree)
    said = other.run(TORCH_FREE)
    assert "topk_select" in said and "isa" in said
