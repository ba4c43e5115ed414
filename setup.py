"""Builds ``vidtok._C`` and, with nvcc, ``vidtok._cuda`` through CMake. Everything else is in pyproject.toml.

torch is never imported here, so that the build works without it and serves any version of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_EXT = os.environ.get("VIDTOK_NO_EXT", "") not in ("", "0")
SANITIZE = os.environ.get("VIDTOK_SANITIZE", "")
# What the CUDA kernels are written and tuned for, and what is built where no GPU is visible.
SMS = (70, 80, 86, 89, 90)
WITHOUT_A_GPU = "80;86;89;90+ptx"
# Memory that one compiler may take, in GiB.
CXX_GIB, NVCC_GIB = 1.5, 2.0


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


def jobs(gib_each: float) -> int:
    """Compilers that run at once: one per core, as far as memory goes."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = []
    with contextlib.suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # a container's own limit; "max" is no number
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min([cores, *(int(limit / 2**30 / gib_each) for limit in limits)]))


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]

    @property
    def name(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"


def find_nvcc() -> Nvcc | None:
    """nvcc that runs: CUDACXX alone where it is set, else of CUDA_HOME, on PATH or in the usual folder."""
    if os.environ.get("CUDACXX"):
        candidates = [os.environ["CUDACXX"]]
    else:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        folders = [f"{home}/bin"] if home else []
        folders += [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/local/cuda/bin"]
        candidates = [found for folder in folders if (found := shutil.which("nvcc", path=folder))]
    for path in candidates:
        with contextlib.suppress(OSError):
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
            match = re.search(r"release (\d+)\.(\d+)", said.stdout)
            if said.returncode == 0 and match:
                return Nvcc(path, (int(match[1]), int(match[2])))
    return None


def visible_sms() -> list[int]:
    """Compute capabilities of the GPUs here, 90 for 9.0; none without a driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        if said.returncode == 0:
            return sorted({int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d+)", said.stdout)})
    return []


def images_for(sm: int) -> str:
    """The best image for a GPU: machine code of its own generation, else PTX of the newest; empty for none."""
    same = [s for s in SMS if s // 10 == sm // 10 and s <= sm]
    return str(same[-1]) if same else f"{SMS[-1]}-virtual" if sm > SMS[-1] else ""


def parse_archs(text: str) -> list[str]:
    """CMake's names of the images of ``80;90``, ``90+ptx`` (machine code and PTX) or ``80-virtual`` (PTX alone)."""
    images = []
    for word in re.split(r"[;,\s]+", text.strip("; ,")):
        match = re.fullmatch(r"(\d+)(\+ptx|-virtual|-real)?", word)
        if not match or int(match[1]) not in SMS:
            known = ", ".join(map(str, SMS[:-1]))
            stop(
                f"expected VIDTOK_CUDA_ARCHS of none or of {known} or {SMS[-1]}, each alone, with +ptx (and PTX) or "
                f"with -virtual (PTX only), got {text!r}"
            )
            raise AssertionError
        if match[2] != "-virtual":
            images.append(f"{match[1]}-real")
        if match[2] in ("+ptx", "-virtual"):
            images.append(f"{match[1]}-virtual")
    return sorted(set(images))


def cuda_images(dev: bool) -> tuple[Nvcc | None, list[str]]:
    """The CUDA images to build and with what; says why where there are none."""
    wanted = os.environ.get("VIDTOK_CUDA_ARCHS", "").strip()
    if wanted == "none" or os.environ.get("VIDTOK_NO_CUDA", "") not in ("", "0") or SANITIZE:
        say("the CPU part is built, as asked")
        return None, []
    images = parse_archs(wanted) if wanted else []
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted:
            stop(f"expected nvcc for VIDTOK_CUDA_ARCHS={wanted} (on PATH, or CUDACXX or CUDA_HOME), found none")
        say("no nvcc: the CPU part is built")
        return None, []
    sms = [] if wanted else visible_sms()
    if not wanted and dev and not sms:
        # A build in place is a developer's: minutes of nvcc for GPUs that are not here are spent only when asked for.
        say("no GPU here: the CPU part is built in place (VIDTOK_CUDA_ARCHS=80 adds CUDA for sm_80)")
        return None, []
    obstacle = None
    if nvcc.version < (12, 0):
        obstacle = f"expected nvcc 12.0 or newer, got {nvcc.name}"
    elif sms:
        archs = sorted({image for image in map(images_for, sms) if image})
        if archs:
            images = parse_archs(";".join(archs))
        else:
            obstacle = f"expected a GPU of sm_70 or sm_80 or newer, got {', '.join(f'sm_{sm}' for sm in sms)}"
    elif not wanted:
        images = parse_archs(WITHOUT_A_GPU if nvcc.version >= (13, 0) else f"70;{WITHOUT_A_GPU}")
    if obstacle is None and nvcc.version >= (13, 0) and any(image.startswith("70-") for image in images):
        obstacle = f"{nvcc.name} cannot compile for sm_70: a CUDA 12 toolkit can (CUDACXX names its nvcc)"
    if obstacle is not None:
        if wanted:
            stop(obstacle)
        say(f"{obstacle}; the CPU part is built")
        return None, []
    say(f"{nvcc.name}: CUDA kernels are built for {', '.join(images)}")
    return nvcc, images


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
        self.nvcc, self.images = cuda_images(self.dev)
        if self.images:
            cuda = Extension("vidtok._cuda", sources=[])
            self.extensions.append(cuda)
            # As setuptools prepares the extensions it knows from the start.
            cuda._full_name = cuda.name
            cuda._links_to_dynamic = cuda._needs_stub = False
            cuda._file_name = self.get_ext_filename(cuda.name)
            self.ext_map[cuda.name] = self.ext_map["_cuda"] = cuda
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

        # The folder is fixed, so that a developer's second build compiles only what changed. Its cache names
        # programs by path; inside an isolated build they are gone the next time, hence the stamp.
        soabi, where = sysconfig.get_config_var("SOABI"), "dev" if self.dev else "wheel"
        configure = [
            "-G", "Ninja" if ninja else "Unix Makefiles",
            f"-DCMAKE_MAKE_PROGRAM={make}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVIDTOK_PYBIND11_INCLUDE={find_pybind11()}",
        ]  # fmt: skip
        if ext.name == "vidtok._cuda":
            assert self.nvcc is not None
            folder = ROOT / "build" / f"cuda-{soabi}-{'-'.join(self.images)}-{where}"
            configure += [
                "-DVIDTOK_BUILD_MODULE=OFF",
                f"-DVIDTOK_CUDA_IMAGES={';'.join(self.images)}",
                f"-DCMAKE_CUDA_COMPILER={self.nvcc.path}",
                f"-DCMAKE_CUDA_HOST_COMPILER={os.environ.get('CUDAHOSTCXX') or compiler}",
            ]
            self.cmake(cmake, folder, configure, jobs(NVCC_GIB), "VIDTOK_NO_CUDA=1 installs the CPU part")
        else:
            folder = ROOT / "build" / f"cmake-{soabi}-{SANITIZE.replace(',', '-') or 'release'}-{where}"
            configure += [f"-DVIDTOK_SANITIZE={SANITIZE}"]
            self.cmake(cmake, folder, configure, jobs(CXX_GIB), "VIDTOK_NO_EXT=1 installs the pure Python part")
        (built,) = (folder / "module").glob(f"{ext.name.rpartition('.')[2]}.*")
        install(built, Path(self.get_ext_fullpath(ext.name)))

    def cmake(self, cmake: str, folder: Path, configure: list[str], jobs: int, otherwise: str) -> None:
        command = [cmake, "-S", str(ROOT), "-B", str(folder), *configure]
        stamp = folder / "vidtok-stamp.json"
        version = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        wanted = json.dumps([command, version])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists() and (not stamp.is_file() or stamp.read_text() != wanted):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.call(command, otherwise)
            stamp.write_text(wanted)
            self.call([cmake, "--build", str(folder), "--parallel", str(jobs)], otherwise)

    def call(self, command: list[str], otherwise: str) -> None:
        if subprocess.run(command).returncode:
            stop(f"`{' '.join(command)}` failed (see above); {otherwise}")


if NO_EXT:
    say("VIDTOK_NO_EXT is set: only the pure Python part is installed")

setup(
    ext_modules=[] if NO_EXT else [Extension("vidtok._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
