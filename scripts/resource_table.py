"""What the compilers say that kernels use, and the checked-in tables of it."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

# Registers may move by this much before a check fails: compilers differ by a few from one version to the next.
SLACK = 8
REGISTERS = 65536  # of an SM, whichever
WARPS = {70: 64, 80: 64, 86: 48, 89: 48, 90: 64}
SHARED_KB = {70: 96, 80: 164, 86: 100, 89: 100, 90: 228}


class Row(NamedTuple):
    """One kernel on one SM. ``warps``: of an SM that can hold the kernel at once."""

    op: str
    kernel: str
    sm: int
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    compiler: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.op, self.kernel, self.sm


class Used(NamedTuple):
    """What ptxas says of one kernel; bytes, except registers."""

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int


def warps_by_registers(sm: int, registers: int) -> int:
    """Warps an SM can hold: registers are handed out to a warp by 256, and warps to four schedulers."""
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    return min(WARPS[sm], REGISTERS // per_warp // 4 * 4)


def warps_of_blocks(sm: int, registers: int, shared: int, warps: int) -> int:
    """Warps an SM can hold of blocks of ``warps`` warps and ``shared`` bytes (and 1 KB of the system, from sm_80)."""
    blocks = warps_by_registers(sm, registers) // warps
    per_block = shared + (1024 if sm >= 80 else 0)
    if per_block:
        blocks = min(blocks, SHARED_KB[sm] * 1024 // per_block)
    return min(blocks, 32 if sm in (70, 80, 90) else 24 if sm == 89 else 16) * warps


def demangle(names: Collection[str]) -> dict[str, str]:
    """C++ names of symbols."""
    for program in ("c++filt", "cu++filt", "llvm-cxxfilt"):
        try:
            said = subprocess.run([program], input="\n".join(names), capture_output=True, text=True)
        except OSError:
            continue
        if said.returncode == 0:
            return dict(zip(names, said.stdout.splitlines(), strict=True))
    raise SystemExit("expected c++filt (Debian and Ubuntu: apt-get install binutils), found none")


def parse_ptxas(log: str) -> list[Used]:
    """Kernels, by symbol, in the output of ``ptxas -v``. What a called function spills counts for its kernel."""
    kernels: list[dict[str, int | str]] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            kernels.append({"kernel": match[1], "registers": 0, "spills": 0, "stack": 0, "shared": 0})
        elif not kernels:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1]["stack"] = int(kernels[-1]["stack"]) + int(match[1])
            kernels[-1]["spills"] = int(kernels[-1]["spills"]) + int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1]["registers"] = int(match[1])
            if match := re.search(r"(\d+)(?:\+0)? bytes smem", line):
                kernels[-1]["shared"] = int(match[1])
    return [Used(**k) for k in kernels]  # type: ignore[arg-type]


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [Row(**{f: r[f] if f in ("op", "kernel", "compiler") else int(r[f]) for f in Row._fields}) for r in rows]


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(Row._fields)
        out.writerows(sorted(rows))


def differences(now: Iterable[Row], table: Iterable[Row], ops: Collection[str], script: str) -> list[str]:
    """One sentence per regression against the table; of ``ops`` only."""
    known = {row.key: row for row in table if row.op in ops}
    out: list[str] = []
    new: dict[tuple[str, str], list[int]] = {}
    for row in now:
        name = f"{row.op}: {row.kernel} on sm_{row.sm}"
        if row.spills:
            out.append(f"{name} spills {row.spills} bytes of registers ({row.compiler}); kernels may not spill")
        old = known.pop(row.key, None)
        if old is None:
            new.setdefault(row.key[:2], []).append(row.sm)
            continue
        for field, slack in (("registers", SLACK), ("stack", 0), ("shared", 0)):
            before, after = getattr(old, field), getattr(row, field)
            if after > before + slack:
                unit = "registers" if field == "registers" else f"bytes of {field} memory"
                out.append(
                    f"{name} needs {after} {unit} ({row.compiler}), the table has {before} ({old.compiler}); "
                    f"where that is meant, run {script} --write"
                )
    gone: dict[tuple[str, str], list[int]] = {}
    for op, kernel, sm in known:
        gone.setdefault((op, kernel), []).append(sm)
    for what, kernels in (("has no row in the table", new), ("is in the table only", gone)):
        for (op, kernel), sms in kernels.items():
            on = ", ".join(f"sm_{sm}" for sm in sorted(sms))
            out.append(f"{op}: {kernel} on {on} {what}; run {script} --write")
    return out


def settle(now: list[Row], path: Path, ops: Collection[str], every: Collection[str], script: str, writes: bool) -> int:
    """Write the table or compare with it; the exit status."""
    table = read(path)
    if writes:
        faults = differences(now, now, ops, script)  # what no table excuses
        write(path, [row for row in table if row.op in every and row.op not in ops] + now)
        print(f"{path.name}: {len(now)} rows of {len(ops)} operators written")
    else:
        # An operator that is gone keeps no rows.
        faults = differences(now, table, {*ops, *({row.op for row in table} - set(every))}, script)
        print(f"{path.name}: {len(now)} kernels of {len(ops)} operators compared")
    for line in faults:
        print(line)
    return 1 if faults else 0
