"""Builds ``vidtok._C`` through CMake. Everything else is in pyproject.toml.

torch is never imported here, so that the build works without it and serves any version of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_EXT = os.environ.get("VIDTOK_NO_EXT", "") not in ("", "0")
SANITIZE = os.environ.get("VIDTOK_SANITIZE", "")


def say(line: str) -> None:
    print(f"vidtok: {line}", flush=True)


def stop(line: str) -> None:
    raise SystemExit(f"vidtok: {line}")


def runs(program: str) -> bool:
    """Whether ``program --version`` succeeds; a pyenv shim or a deleted wheel may be on PATH and not run."""
    with contextlib.suppress(OSError):
        return subprocess.run([program, "--version"], capture_output=True).returncode == 0
    return False


def find_program(*names: str, env: str) -> str | None:
    if os.environ.get(env):
        return os.environ[env]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for name in names:
        for folder in path.split(os.pathsep):
            found = shutil.which(name, path=folder)
            if found and runs(found):
                return found
    return None


def find_pybind11() -> Path:
    """Include folder of pybind11: its own package, else the copy inside torch (found, not imported)."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            include = Path(folder) / "include"
            if (include / "pybind11" / "pybind11.h").is_file():
                return include
    stop("expected pybind11's headers (pip install pybind11, or an installed torch), found neither")
    raise AssertionError


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError):
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return max(1, min(cores, int(gib / 1.5)))
    return cores


def install(source: Path, target: Path) -> None:
    """Copy under a new inode: a process that has the old file mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)
    say(f"built {target}")


class CleanBuild(build):
    def run(self) -> None:
        # Leftovers of an earlier build in this tree would be packed into the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.dev = bool(self.inplace or self.editable_mode)
        super().run()

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            in_source, built = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            install(Path(built), ROOT / in_source)

    def build_extension(self, ext: Extension) -> None:
        compiler = find_program("c++", "g++", "clang++", env="CXX")
        if compiler is None:
            stop(
                "expected a C++17 compiler (c++, g++ or clang++ on PATH, or CXX), found none. Install one "
                "(Debian and Ubuntu: apt-get install g++) or set VIDTOK_NO_EXT=1 to install the pure Python part"
            )
        cmake = find_program("cmake", env="CMAKE_EXECUTABLE")
        if cmake is None:
            stop("expected CMake 3.20 or newer (pip install cmake), found none")
        ninja = find_program("ninja", "ninja-build", env="VIDTOK_NINJA")
        make = ninja or find_program("make", "gmake", env="MAKE_EXECUTABLE")
        if make is None:
            stop("expected ninja (pip install ninja) or make, found neither")
        if shutil.which("nvcc"):
            say("nvcc found; this version has no CUDA kernels yet: the CPU part is built")
        else:
            say("no nvcc: the CPU part is built")

        # The folder is fixed, so that a developer's second build compiles only what changed. Its cache names
        # programs by path; inside an isolated build they are gone the next time, hence the stamp.
        kind = f"{sysconfig.get_config_var('SOABI')}-{SANITIZE.replace(',', '-') or 'release'}"
        folder = ROOT / "build" / f"cmake-{kind}-{'dev' if self.dev else 'wheel'}"
        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(folder),
            "-G", "Ninja" if ninja else "Unix Makefiles",
            f"-DCMAKE_MAKE_PROGRAM={make}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVIDTOK_PYBIND11_INCLUDE={find_pybind11()}",
            f"-DVIDTOK_SANITIZE={SANITIZE}",
        ]  # fmt: skip
        stamp = folder / "vidtok-stamp.json"
        version = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        wanted = json.dumps([configure, version])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists() and (not stamp.is_file() or stamp.read_text() != wanted):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.call(configure)
            stamp.write_text(wanted)
            self.call([cmake, "--build", str(folder), "--parallel", str(jobs())])
            (self.built,) = (folder / "module").glob("_C.*")
            install(self.built, Path(self.get_ext_fullpath(ext.name)))

    def call(self, command: list[str]) -> None:
        if subprocess.run(command).returncode:
            stop(f"`{' '.join(command)}` failed (see above); VIDTOK_NO_EXT=1 installs the pure Python part")


if NO_EXT:
    say("VIDTOK_NO_EXT is set: only the pure Python part is installed")

setup(
    ext_modules=[] if NO_EXT else [Extension("vidtok._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
