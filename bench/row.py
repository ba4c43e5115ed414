"""One dataclass is one row of the CSV; tables and plots read only that."""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """A measurement. Times in µs, memory in MiB; empty fields do not apply."""

    metric: str  # time, overhead, memory or rate
    unit: str
    operator: str
    case: str
    cache: str  # cold, hot or empty
    role: str
    label: str
    p20: float
    p50: float
    p80: float
    samples: int
    limit: float | None = None  # µs, median
    limit_kind: str = ""
    over_limit: float | None = None  # median of the pairs
    speedup: float | None = None  # this side's time over vidtok's, median of the pairs
    bytes: float | None = None
    flops: float | None = None
    target: str = ""
    reached: str = ""
    threads: int = 0
    isa: str = ""
    machine: str = ""
    versions: str = ""
    commit: str = ""
    timestamp: str = ""


_NUMBERS = {"p20", "p50", "p80", "limit", "over_limit", "speedup", "bytes", "flops"}


def write(rows: Iterable[Row], path: Path) -> None:
    """Replace the file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _text(v) for k, v in asdict(row).items()})


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """Rows of a file that :func:`write` made."""
    out = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            values: dict[str, object] = dict(record)
            for name in _NUMBERS:
                values[name] = float(record[name]) if record[name] else None
            for name in ("samples", "threads"):
                values[name] = int(record[name])
            out.append(Row(**values))  # type: ignore[arg-type]
    return out


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """Commit of the working tree, with ``+`` when the code that was measured is not what it holds."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        paths = ["csrc", "python", "bench", ":!bench/results"]
        dirty = subprocess.run(["git", "status", "--porcelain", "--", *paths], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""


def context(threads: int) -> dict[str, str | int]:
    """The fields that every row of a run shares."""
    import vidtok
    from vidtok.kernels import select

    return {
        "threads": threads,
        "isa": str(select.build_info().get("isa", "reference")),
        "machine": f"{cpu_name()}, {threads} threads",
        "versions": f"vidtok {vidtok.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine_file(kind: str) -> Path:
    """Where a run of ``kind`` on this machine is kept."""
    return RESULTS / f"{kind}-{re.sub(r'[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}.csv"
