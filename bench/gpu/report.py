"""Plots and a table of the results of one card; both say only what its CSV files hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from bench import plots
from bench.readme import _speedup, _time
from bench.row import Row, read

HEAD = "| operator | shape | graph | call | × limit | bound by | eager | torch.compile | launches | target | reached |"


def table(rows: list[Row]) -> list[str]:
    """One line per case: time inside a graph, time of a call, and speed-ups inside graphs."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.metric in ("time", "count"):
            key = f"{row.cache} {row.role}" if row.metric == "time" else row.label
            cases.setdefault((row.operator, row.case), {})[key] = row
    lines = [HEAD, "|---|---|--:|--:|--:|---|--:|--:|--:|---|---|"]
    for (operator, case), sides in cases.items():
        ours, call = sides["graph vidtok"], sides["call vidtok"]
        others = [_speedup(sides[k].speedup if k in sides else None) for k in ("graph eager", "graph compile")]
        launches = sides["kernels launched"].p50
        cells = [
            f"`{operator}`", case, _time(ours.p50), _time(call.p50), f"{ours.over_limit:.2f}", ours.limit_kind, *others,
            f"{launches:.0f}", ours.target, ours.reached,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(folder: str) -> int:
    """Write ``<backend>.md`` and two plots beside each CSV."""
    for path in sorted(Path(folder).glob("*.csv")):
        if path.stem == "stages":
            continue
        rows = read(path)
        machine = next((f"{r.machine}; {r.versions}; commit {r.commit}" for r in rows), "")
        if path.stem in ("decoder", "vision"):
            from bench.readme import decoder_table, vision_table

            lines = (decoder_table if path.stem == "decoder" else vision_table)(rows)
            path.with_suffix(".md").write_text("\n".join([f"# {machine}", "", *lines, ""]))
            continue
        rates = [f"- {r.label}: {r.p50:.4g} {r.unit}" for r in rows if r.metric == "rate"]
        path.with_suffix(".md").write_text("\n".join([f"# {machine}", "", *rates, "", *table(rows), ""]))
        # The plots show what is cold; on a GPU that is the time inside a graph.
        shown = [replace(r, cache="cold") for r in rows if r.metric == "time" and r.cache == "graph"]
        if shown:
            plots.draw_rows(shown, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
