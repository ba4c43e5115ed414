"""``vidtok doctor``: what is installed, built and chosen. Standard library only; every probe may fail alone."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

_PACKAGES = ("torch", "transformers", "numpy", "decord", "av", "PIL", "typer", "rich", "jinja2")
_DISTRIBUTIONS = {"PIL": "pillow"}
_REQUIRED = ("torch", "transformers", "numpy", "PIL", "typer", "rich", "jinja2")
_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")
_SECONDS = 120

_TORCH = """
print("threads", torch.get_num_threads(), "of", os.cpu_count())
print("cuda", torch.version.cuda or "not built")
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"gpu {i}", p.name, f"sm_{p.major}{p.minor}", f"{p.total_memory / 2**30:.0f} GiB")
"""

_SELECT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from vidtok.kernels import select
out = {"build": {}, "rows": []}
for key, get in (("build", select.build_info), ("rows", lambda: [[str(v) for v in row] for row in select.report()])):
    try:
        out[key] = get()
    except Exception as error:
        out[key + "_error"] = f"{type(error).__name__}: {error}"
def gpus():
    import torch
    found = []
    for i in range(torch.cuda.device_count()):
        rows = [[*map(str, row), select.obstacles(row.operator, i)] for row in select.report(i)]
        found.append({"name": torch.cuda.get_device_name(i), "sm": select.sm_of(i), "rows": rows})
    return found
def cuda():
    from vidtok.kernels import cuda
    module = cuda.extension()
    return {"missing": cuda.obstacle(0)} if module is None else dict(module.build_info())
for key, get in (("gpus", gpus), ("cuda", cuda)):
    try:
        out[key] = get()
    except Exception as error:
        out[key + "_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(out, default=str))
"""


def main(sm: int | None = None) -> int:
    """Print the report, with the table of one SM if named; 0 when all that vidtok needs is in order, else 1.

    An SM that no table serves is bad input, 2.
    """
    if sm is not None and sm < 70:
        print(f"vidtok: expected an SM of at least 70, got {sm}", file=sys.stderr)
        return 2
    probes = {name: _start(_import_code(name)) for name in _PACKAGES}
    probes["kernels"] = _start(_SELECT)
    problems: list[str] = []
    _section("vidtok")
    _row("version", _guard(_own_version))
    _row("folder", os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    _section("packages")
    for name in _PACKAGES:
        _package(name, probes[name], problems)
    _section("processor")
    for label, value in _guard(_processor, default=[("processor", "unknown")]):
        _row(label, value)
    _section("extension")
    files = _guard(_extensions, default=[])
    _row("files", ", ".join(files) or "none built")
    found = _kernels(probes["kernels"], problems)
    _gpu(found)
    _section("tables of GPU kernels")
    wrong = _guard(lambda: _tables(found, sm))
    if wrong is not None:
        _row("tables", wrong)
    _section("settings")
    names = sorted(k for k in os.environ if k.startswith("VIDTOK_") or k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    for name in names:
        _row(name, os.environ[name])
    if not names:
        _row("environment", "no variable of vidtok is set")
    _section("result")
    for problem in problems:
        _row("problem", problem)
    if not problems:
        _row("all well", "what vidtok needs is in order")
    return 1 if problems else 0


def _section(name: str) -> None:
    print(f"\n{name}" if name != "vidtok" else name)


def _row(label: str, value: Any) -> None:
    lines = [" ".join(line.split()) for line in str(value).splitlines() if line.strip()] or [""]
    print(f"  {label:<20} {lines[0]}")
    for line in lines[1:]:
        print(f"  {'':<20} {line}")


def _guard(probe: Any, default: Any = "unknown") -> Any:
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})" if default == "unknown" else default


def _own_version() -> str:
    import vidtok

    return vidtok.__version__


def _import_code(name: str) -> str:
    return f"import os, sys, {name}\nprint('ok')\n" + (_TORCH if name == "torch" else "")


def _start(code: str) -> Any:
    """Begin a probe in a child, so that a package that crashes on import is reported like one that raises."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": path},
        )
    except OSError as error:
        return error


def _finish(probe: Any) -> tuple[str | None, str]:
    """(what is wrong or None, what was printed)."""
    if isinstance(probe, OSError):
        return f"the probe did not start: {probe}", ""
    try:
        out, err = probe.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return f"no answer within {_SECONDS} s", ""
    if probe.returncode == 0:
        return None, out
    if probe.returncode < 0:
        return f"crashed (signal {-probe.returncode})", out
    lines = [line for line in err.strip().splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"exit code {probe.returncode}"), out


def _package(name: str, probe: Any, problems: list[str]) -> None:
    distribution = _DISTRIBUTIONS.get(name, name)
    try:
        version = importlib.metadata.version(distribution)
    except Exception:
        version = None
    wrong, out = _finish(probe)
    if wrong is None:
        _row(distribution, "\n".join([version or "version unknown", *out.splitlines()[1:]]))
        return
    absent = version is None and "ModuleNotFoundError" in wrong
    _row(distribution, "not installed" if absent else f"{version or 'version unknown'}, does not import: {wrong}")
    if name in _REQUIRED:
        problems.append(f"{distribution} is {'missing' if absent else 'installed and does not import'}")


def _processor() -> list[tuple[str, str]]:
    rows = []
    lines = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    rows.append(("processor", model or platform.processor() or "unknown"))
    flags = set(next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), []))
    rows.append(("has", " ".join(f for f in _FLAGS if f in flags) or "unknown"))
    rows.append(("has not", " ".join(f for f in _FLAGS if f not in flags) if flags else "unknown"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows.append(("cores", f"{usable} usable of {os.cpu_count()}"))
    return rows


def _extensions() -> list[str]:
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [os.path.basename(p) for p in sorted(glob.glob(os.path.join(folder, "_C*")))]


def _kernels(probe: Any, problems: list[str]) -> dict[str, Any]:
    wrong, out = _finish(probe)
    found: dict[str, Any] = {}
    if wrong is None:
        try:
            found = json.loads(out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            wrong = "the answer could not be read"
    if wrong is not None:
        _row("build", f"unknown: {wrong}")
        problems.append(f"the operators do not load: {wrong}")
        return {}
    build = found.get("build") or {}
    for key, value in build.items():
        _row(key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
    for key in ("build_error", "rows_error"):
        if key in found:
            _row(key.replace("_", " "), found[key])
            problems.append(f"the operators answer with an error: {found[key]}")
    if not build.get("extension", True):
        _row("", "the reference operators in plain torch serve, slower")
    _section("operators")
    for operator, backend, reason in (row[:3] for row in found.get("rows", [])):
        _row(operator, f"{backend}: {reason}")
    return found


def _gpu(found: dict[str, Any]) -> None:
    """What the CUDA binary holds, and which backends serve each GPU."""
    _section("gpu backends")
    cuda = found.get("cuda") or {"missing": found.get("cuda_error", "unknown")}
    if "missing" in cuda:
        _row("cuda", cuda["missing"])
    else:
        images = ", ".join(f"sm_{s}" for s in cuda.get("sms", [])) or "no SM"
        portable = ", ".join(f"compute_{p}" for p in cuda.get("ptx", [])) or "none"
        where = ", for the host" if cuda.get("host") else ""
        _row("cuda", f"holds {images}; PTX: {portable} ({cuda.get('compiler', 'compiler unknown')}{where})")
    try:
        _row("triton", importlib.metadata.version("triton"))
    except Exception:
        _row("triton", "not installed")
    if "gpus_error" in found:
        _row("gpus", found["gpus_error"])
    elif not found.get("gpus"):
        _row("gpus", "none that torch can use")
    for index, gpu in enumerate(found.get("gpus") or []):
        _section(f"operators on cuda:{index}, {gpu['name']}, sm_{gpu['sm']}")
        why: dict[str, None] = {}
        for operator, backend, reason, obstacles in gpu["rows"]:
            able = [name for name, obstacle in obstacles.items() if obstacle is None]
            _row(operator, f"{backend}: {reason}" + (f"; can: {', '.join(able)}" if len(able) > 1 else ""))
            # "Can't run plan_apply on the cuda backend; ..." says the same of every operator.
            why.update({f"{n}: {o.split('; ', 1)[-1]}": None for n, o in obstacles.items() if o})
        for text in why:
            _row("passed over", text)


def _tables(found: dict[str, Any], sm: int | None) -> None:
    """Table entries and their sources: one line per operator for GPUs that are here, every shape for ``--sm``."""
    from vidtok.kernels import tables
    from vidtok.kernels.tables import _files

    path = _files.user_path()
    state = "none: VIDTOK_TUNING=off" if path is None else f"{path}{'' if path.exists() else ' (absent)'}"
    _row("user table", state)
    present = sorted({int(gpu["sm"]) for gpu in found.get("gpus") or []})
    if sm is None and not present:
        for known, gpu in tables.GPUS.items():
            sources = [e.source.split(",")[0] for e in _files.shipped(known).entries.values()]
            counts = ", ".join(f"{sources.count(s)} {s}" for s in sorted(set(sources)))
            _row(f"sm_{known}", f"shipped for {gpu.name}: {counts}; `vidtok doctor --sm {known}` lists them")
    for one in present if sm is None else [sm]:
        _row(f"sm_{one}", f"the table of sm_{tables.nearest(one)}, {tables.GPUS[tables.nearest(one)].name}")
        for op in tables.OPERATORS:
            for backend in tables.backends(one):
                for dtype in tables.dtypes(op, one):
                    _entries(op, backend, one, dtype, whole=sm is not None)


def _entries(op: str, backend: str, sm: int, dtype: str, whole: bool) -> None:
    from vidtok.kernels import tables

    if not whole and dtype != tables.dtypes(op, sm)[-1]:
        return
    listed = tables.shapes(op, dtype)
    for shape in listed if whole else listed[len(listed) // 2 : len(listed) // 2 + 1]:
        entry = tables.entry(backend, op, sm, dtype, shape)
        extents = " ".join(f"{k}={v}" for k, v in shape.items())
        knobs = " ".join(f"{k}={v}" for k, v in entry.knobs.items())
        _row(op, f"{backend} {dtype} {extents}: {knobs}; {entry.source}; limit {entry.limit or 'not known'}")
