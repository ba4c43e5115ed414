"""Fill the README's benchmark block and the longer page beside the CSV; both say only what the CSV holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench.row import RESULTS, ROOT, Row, read

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU_MARKS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
DECODER_MARKS = ("<!-- decoder:begin -->", "<!-- decoder:end -->")
VISION_MARKS = ("<!-- vision:begin -->", "<!-- vision:end -->")
NO_VISION = "Not yet measured.\n"
NO_DECODER = "Not yet measured.\n"
NO_GPU = "The GPU kernels are not yet measured on a GPU, and nothing is claimed about their speed.\n"
README = ROOT / "README.md"
NOTES = ROOT / "bench" / "what_limits.json"
HEAD = "| operator | shape | vidtok | × limit | eager | torch.compile | careful | target | reached |"


def _time(us: float) -> str:
    if us >= 1000:
        return f"{us / 1000:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"
    return f"{us:.3g} µs"


def _speedup(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}×" if value < 100 else f"{value:.0f}×"


def _note(row: Row, notes: dict[str, str]) -> str:
    """The note whose key is the longest start of "operator case"."""
    name = f"{row.operator} {row.case}"
    keys = [k for k in notes if name.startswith(k)]
    return notes[max(keys, key=len)] if keys else ""


def _reached(row: Row, notes: dict[str, str]) -> str:
    if not row.reached.startswith("no"):
        return row.reached
    note = _note(row, notes)
    return row.reached + (f". {note}" if note else "")


def table(rows: list[Row], cache: str, notes: dict[str, str]) -> list[str]:
    """One line per case."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.metric == "time" and row.cache == cache:
            cases.setdefault((row.operator, row.case), {})[row.role] = row
    lines = [HEAD, "|---|---|--:|--:|--:|--:|--:|---|---|"]
    before = ""
    for (operator, case), sides in cases.items():
        ours = sides["vidtok"]
        rest = {k: r for k, r in sides.items() if k not in ("vidtok", "eager", "compile")}
        best = min(rest.values(), key=lambda r: r.speedup or 0.0, default=None)
        careful = "" if best is None else f"{_speedup(best.speedup)}{'' if best.role == 'careful' else f' {best.role}'}"
        cells = [
            f"`{operator}`" if operator != before else "",
            case,
            _time(ours.p50),
            "" if ours.over_limit is None else f"{ours.over_limit:.2f}",
            *(_speedup(sides[k].speedup if k in sides else None) for k in ("eager", "compile")),
            careful,
            ours.target,
            _reached(ours, notes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before = operator
    return lines


def _others(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    overhead = [r for r in rows if r.metric == "overhead"]
    if overhead:
        lines += ["", "| Python of a call, under `no_grad` | time | target | reached |", "|---|--:|---|---|"]
        lines += [f"| {r.case} (`{r.label}`) | {r.p20:.2f} {r.unit} | {r.target} | {r.reached} |" for r in overhead]
    memory = [r for r in rows if r.metric == "memory"]
    if memory:
        lines += ["", f"| memory at {memory[0].case}, beyond inputs and outputs | peak | reached |", "|---|--:|---|"]
        lines += [f"| `{r.operator}` | {r.p50:.0f} {r.unit} | {r.reached} |" for r in memory]
    return lines


def _head(rows: list[Row]) -> str:
    """Where and when, and the rates that the limit is made of."""
    best: dict[str, tuple[str, float]] = {}
    for row in rows:
        if row.metric == "rate" and row.p50 > best.get(row.unit, ("", 0.0))[1]:
            best[row.unit] = (row.label, row.p50)
    read = best.pop("GB/s read", None)
    rates = ", ".join(f"{value:.0f} {unit} ({label})" for unit, (label, value) in best.items())
    if read:
        rates += f"; reading alone reaches {read[1]:.0f} GB/s ({read[0]})"
    first = rows[0]
    return (
        f"{first.machine}, fp32, {first.isa} kernels; {first.versions}; "
        f"{f'commit {first.commit}, ' if first.commit else ''}{first.timestamp[:10]}. "
        f"Limit: {rates}."
    )


def render(path: Path) -> str:
    """The README's block for one CSV."""
    rows = read(path)
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    lines = [
        _head(rows),
        "",
        "Cold cache, median of the pairs. *× limit* is our time over the least time that the machine allows; the "
        "columns after it say how many times longer the others take. *eager* is the published algorithm, *careful* the "
        f"best plain torch (or faiss) that we could write. [All numbers]({name}.csv), [with a hot cache]({name}.md), "
        f"[as a picture]({name}-limit.png).",
        "",
        *table(rows, "cold", notes),
        *_others(rows),
    ]
    return "\n".join(lines) + "\n"


def page(path: Path) -> str:
    """The longer page: what each side is, and the hot table."""
    rows = read(path)
    lines = ["# Benchmarks, hot cache and sides", "", _head(rows), ""]
    lines += ["Inputs and outputs stay where they are, so the time over the limit may fall below 1.", ""]
    lines += table(rows, "hot", {})
    lines += ["", "| operator | side | what it runs |", "|---|---|---|"]
    seen = set()
    for row in rows:
        key = (row.operator, row.role, row.label)
        if row.metric == "time" and row.role != "vidtok" and key not in seen:
            seen.add(key)
            lines.append(f"| `{row.operator}` | {row.role} | {row.label} |")
    return "\n".join(lines) + "\n"


def gpu_block() -> str:
    """The README's block of GPU results: one table for each card with committed results of the CUDA kernels."""
    from bench.gpu import report

    lines: list[str] = []
    for path in sorted(RESULTS.glob("*/cuda.csv")):
        rows = read(path)
        rates = ", ".join(f"{r.label} {r.p50:.4g} {r.unit}" for r in rows if r.metric == "rate")
        folder = path.parent.relative_to(ROOT).as_posix()
        lines += [
            f"{rows[0].machine}; {rows[0].versions}; commit {rows[0].commit}, {rows[0].timestamp[:10]}. {rates}. "
            f"[All numbers]({folder}).",
            "",
            *report.table(rows),
            "",
        ]
    return "\n".join(lines) if lines else NO_GPU


def decoder_table(rows: list[Row]) -> list[str]:
    """One line per measurement of a whole decoder."""
    lines = ["| whole decoder | median | 20 to 80 % | | target | reached |", "|---|--:|---|---|---|---|"]
    for row in rows:
        unit = "" if row.unit == "×" else f" {row.unit}"
        spread = "" if row.samples == 1 else f"{row.p20:.3g} to {row.p80:.3g}{unit}"
        lines.append(
            f"| {row.case} | {row.p50:.3g}{unit or row.unit} | {spread} | {row.label} | {row.target} | {row.reached} |"
        )
    return lines


def decoder_block() -> str:
    """The README's block of whole decoders: the newest CPU run, and every card with results."""
    return _whole("decoder", decoder_table) or NO_DECODER


def _whole(name: str, table_of: Callable[[list[Row]], list[str]]) -> str:
    """Tables of the newest CPU run of a program, and of every card with results of it."""
    found = sorted((read(p)[0].timestamp, p) for p in RESULTS.glob(f"{name}-*.csv"))
    lines: list[str] = []
    for path in [p for _, p in found[-1:]] + sorted(RESULTS.glob(f"*/{name}.csv")):
        rows = read(path)
        first = rows[0]
        lines += [
            f"{first.machine}; {first.versions}; {f'commit {first.commit}, ' if first.commit else ''}"
            f"{first.timestamp[:10]}. [All numbers]({path.relative_to(ROOT).as_posix()}).",
            "",
            *table_of([r for r in rows if r.metric == "model"]),
            "",
        ]
    return "\n".join(lines)


def vision_table(rows: list[Row]) -> list[str]:
    """One line per tower and r, then one per training step."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.label] = row
    others = [
        name
        for name in ("of cutting", "over published", "over careful", "over compiled", "over channel", "over mask")
        if any(name in c for c in cases.values())
    ]
    lines = [
        f"| vision tower | speed-up | ideal | of the ideal | {' | '.join(others)} | missed |",
        f"|---|--:|--:|--:|{'--:|' * len(others)}---|",
    ]
    for case, found in cases.items():
        if "saved for backward" not in found:
            ideal = found["speed-up"].speedup if "speed-up" in found else None
            cells = [
                f"{found[name].p50:.3g}" if name in found else "" for name in ("speed-up", "of the ideal", *others)
            ]
            cells.insert(1, f"{ideal:.3g}" if ideal else "")
            missed = ", ".join(f"{r.label} {r.target}" for r in found.values() if r.reached.startswith("no"))
            lines.append(f"| {' | '.join([case, *cells, missed])} |")
    return lines + _table_of_steps([c for c in cases.values() if "saved for backward" in c])


def _table_of_steps(cases: list[dict[str, Row]]) -> list[str]:
    if not cases:
        return []
    lines = [
        "",
        "| memory | of plain: saved for backward | peak of a step | target | reached |",
        "|---|--:|--:|---|---|",
    ]
    for found in cases:
        saved, peak = found["saved for backward"], found["peak of a step"]
        lines.append(f"| {saved.case} | {saved.p50:.3g} | {peak.p50:.3g} | {peak.target} | {peak.reached} |")
    return lines


def vision_block() -> str:
    """The README's block of whole vision towers: the newest CPU run, and every card with results."""
    return _whole("vision", vision_table) or NO_VISION


def filled(text: str, block: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with ``block`` between the markers."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end} in the README, got another number")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{block}{end}{rest.split(end)[1]}"


def wanted(path: Path) -> str:
    """The README as the committed results have it."""
    text = filled(filled(README.read_text(), render(path)), gpu_block(), GPU_MARKS)
    from bench import retrieval
    from bench.accuracy import results as accuracy

    text = filled(text, decoder_block(), DECODER_MARKS)
    text = filled(text, vision_block(), VISION_MARKS)
    for part in (accuracy, retrieval):
        text = filled(text, part.block(), part.MARKS)
    return text


def update(path: Path) -> None:
    """Write README and page from one CSV, and the GPU tables from theirs."""
    README.write_text(wanted(path))
    path.with_suffix(".md").write_text(page(path))


def latest() -> Path | None:
    """The committed CSV that the README shows: the newest one of a whole run."""
    stamped = [(read(p)[0].timestamp, p) for p in RESULTS.glob("cpu-*.csv")]
    return max(stamped)[1] if stamped else None


def main() -> int:
    """Fill the README, or with ``--check`` say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = latest()
    if path is None:
        print("no CSV under bench/results yet")
        return 0
    if not check:
        update(path)
        return 0
    current = wanted(path) == README.read_text()
    print("README.md is up to date" if current else "README.md differs: run python -m bench.readme")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
