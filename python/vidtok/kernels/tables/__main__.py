"""Write the tables shipped for each SM from the cost model.

    python -m vidtok.kernels.tables            write sm70.json … sm90.json
    python -m vidtok.kernels.tables --check    say which are out of step; exit code 1 if any is
    python -m vidtok.kernels.tables --adopt tuning.json ...   take measured lines in, which later runs keep

Measured lines of the shipped tables stay; the modelled ones are made anew around them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidtok.kernels import tables
from vidtok.kernels.tables import _files
from vidtok.kernels.tables._files import Entry, Table, key


def measured(table: Table) -> Table:
    """The measured lines of a table."""

    def kept(lines: dict[_files.Key, Entry]) -> dict[_files.Key, Entry]:
        return {at: entry for at, entry in lines.items() if entry.source.startswith("measured")}

    return Table(kept(table.frozen), kept(table.entries))


def build(sm: int, known: Table = _files.EMPTY) -> dict[str, Any]:
    """The table of one SM: the ``known`` lines, and modelled ones for every other shape that tables hold."""
    gpu = tables.GPUS[sm]
    out = Table(dict(known.frozen), dict(known.entries))
    for op in tables.OPERATORS:
        own = tables.module(op)
        for backend in tables.backends(sm):
            for dtype in tables.dtypes(op, sm):
                for shape in tables.shapes(op, dtype):
                    fixed, _ = tables.frozen(backend, op, gpu, dtype, shape, (out,))
                    if fixed:
                        canonical = own.frozen(shape)
                        chosen = tables.resolve(backend, op, gpu, dtype, canonical, (out,))
                        line = Entry(fixed, chosen.limit, "modelled", chosen.seconds)
                        out.frozen.setdefault(key(backend, op, dtype, canonical), line)
                    at = key(backend, op, dtype, own.bucket(shape))
                    out.entries[at] = tables.resolve(backend, op, gpu, dtype, shape, (out,))
    return {
        "format": _files.FORMAT,
        "sm": sm,
        "gpu": gpu.name,
        "frozen": _files.lines(out.frozen),
        "entries": _files.lines(out.entries),
    }


def text(sm: int, path: Path, extra: Table = _files.EMPTY) -> str:
    """The file of one SM as it should be, with measured lines of the file at ``path`` and of ``extra``."""
    try:
        now = measured(_files.read(path, sm))
    except ValueError as error:  # the knobs themselves changed
        print(f"{path.name}: {error}; made anew, without its measured lines", file=sys.stderr)
        now = _files.EMPTY
    known = Table({**now.frozen, **extra.frozen}, {**now.entries, **extra.entries})
    return _files.dump(build(sm, known)) + "\n"


def main(arguments: Sequence[str] | None = None, folder: Path = _files.HERE) -> int:
    """Write or compare the files of ``folder``."""
    parser = argparse.ArgumentParser(prog="python -m vidtok.kernels.tables", description="Tables from the cost model.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--adopt", nargs="+", default=[], metavar="FILE", help="tuning files to take in")
    options = parser.parse_args(arguments)
    extra: dict[int, Table] = {}
    for name in options.adopt:
        for sm, found in _files.read_user(Path(name))["gpus"].items():
            extra[int(sm)] = measured(_files.parse(found, int(sm)))
    stale = 0
    for sm in tables.GPUS:
        path = folder / f"sm{sm}.json"
        made = text(sm, path, extra.get(sm, _files.EMPTY))
        if options.check and (not path.is_file() or path.read_text(encoding="utf-8") != made):
            print(f"{path.name} is out of step with the model: run python -m vidtok.kernels.tables", file=sys.stderr)
            stale = 1
        elif not options.check:
            path.write_text(made, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
