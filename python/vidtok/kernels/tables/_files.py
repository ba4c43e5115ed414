"""Tables in files: the JSON shipped for each SM and the user's, both of the same lines.

A table has ``frozen`` lines, the knobs that change bits for one reduced extent, and ``entries``, all knobs for one
bucket of shapes. An entry counts only where its knobs agree with the frozen ones, so that one table never gives two
batch sizes different bits.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vidtok.kernels.tables import _model
from vidtok.kernels.tables._model import Knobs
from vidtok.kernels.tables._operators import BACKENDS, OPERATORS, module
from vidtok.kernels.tables.gpus import GPUS, nearest

logger = logging.getLogger("vidtok")

FORMAT = 1
HERE = Path(__file__).parent
Key = tuple[Any, ...]


class Entry(NamedTuple):
    """What a table says: knobs, what limits them, ``modelled`` or ``measured on <GPU>``, and the time of a call."""

    knobs: Knobs
    limit: str
    source: str
    seconds: float


class Table(NamedTuple):
    """Lines by (backend, operator, dtype, bucket)."""

    frozen: dict[Key, Entry]
    entries: dict[Key, Entry]


EMPTY = Table({}, {})


def key(backend: str, op: str, dtype: str, bucket: Mapping[str, int]) -> Key:
    """Where a line stands in a table."""
    return (backend, op, dtype, *bucket.items())


def parse(found: Any, sm: int) -> Table:
    """A table from JSON; every line is checked.

    Raises:
        ValueError: in one sentence, what is wrong.
    """
    if not isinstance(found, dict):
        raise ValueError(f"expected a table for sm_{sm}, got {type(found).__name__}")
    table = Table({}, {})
    for part, lines in (("frozen", table.frozen), ("entries", table.entries)):
        listed = found.get(part)
        if not isinstance(listed, list):
            raise ValueError(f"expected a list of {part}, got {type(listed).__name__}")
        for line in listed:
            try:
                _line(line, sm, part == "frozen", lines)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"expected a line of {part}, got {json.dumps(line)[:120]} ({error})") from error
    return table


def _line(line: Any, sm: int, frozen: bool, lines: dict[Key, Entry]) -> None:
    backend, op = line["backend"], line["op"]
    if backend not in BACKENDS or op not in OPERATORS:
        raise ValueError(f"expected a backend and an operator, got {backend} and {op}")
    own = module(op)
    allowed = {name: v for name, v in own.KNOBS[backend].items() if not frozen or name in own.BITS[backend]}
    knobs: Knobs = line["knobs"]
    if set(knobs) != set(allowed) or any(type(v) is not int or v not in allowed[n] for n, v in knobs.items()):
        raise ValueError(f"{op}: expected the knobs {allowed}, got {knobs}")
    bucket = line["bucket"]
    if tuple(bucket) != own.SHAPE or any(type(v) is not int for v in bucket.values()):
        raise ValueError(f"{op}: expected a bucket of {', '.join(own.SHAPE)}, got {bucket}")
    entry = Entry(knobs, str(line.get("limit", "")), str(line["source"]), float(line["microseconds"]) / 1e6)
    for dtype in line["dtypes"]:
        gpu = GPUS[nearest(sm)]
        why = None if frozen else _model.misfit(gpu, dtype, own.works(backend, gpu, dtype, bucket, knobs))
        if why is not None:
            raise ValueError(f"{op}: {knobs} does not fit: {why}")
        lines[key(backend, op, dtype, bucket)] = entry


def lines(table: dict[Key, Entry]) -> list[dict[str, Any]]:
    """JSON lines of one part of a table; dtypes that agree share one."""
    out: dict[str, dict[str, Any]] = {}
    for (backend, op, dtype, *bucket), entry in table.items():
        line = {
            "backend": backend,
            "op": op,
            "dtypes": [],
            "bucket": dict(bucket),
            "knobs": entry.knobs,
            "source": entry.source,
            "microseconds": round(entry.seconds * 1e6, 3),
            "limit": entry.limit,
        }
        out.setdefault(json.dumps(line), line)["dtypes"].append(dtype)
    return list(out.values())


def dump(found: Mapping[str, Any], indent: str = "") -> str:
    """JSON with one line per entry, so that a difference reads well."""
    parts = []
    for name, value in found.items():
        if isinstance(value, dict) and any(isinstance(v, list | dict) for v in value.values()):
            text = dump(value, indent + " ")
        elif isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"{indent}  {json.dumps(v)}" for v in value) + f"\n{indent} ]"
        else:
            text = json.dumps(value)
        parts.append(f"{indent} {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n" + indent + "}"


@lru_cache(maxsize=16)
def shipped(sm: int) -> Table:
    """The table shipped for an SM; empty where there is none."""
    return read(HERE / f"sm{sm}.json", sm)


def read(path: Path, sm: int) -> Table:
    """A file of the shipped kind; empty where there is none."""
    return parse(json.loads(path.read_text(encoding="utf-8")), sm) if path.is_file() else EMPTY


def user_path() -> Path | None:
    """Where the user's table is or would be; None when ``VIDTOK_TUNING=off``."""
    named = os.environ.get("VIDTOK_TUNING")
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vidtok" / "tuning.json"


def read_user(path: Path) -> dict[str, Any]:
    """The user's file; an empty one where there is none.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    if not path.exists():
        return {"format": FORMAT, "gpus": {}}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("gpus"), dict):
        raise ValueError(f"expected a tuning file of format {FORMAT}")
    return found


@lru_cache(maxsize=16)
def user(sm: int) -> Table:
    """The user's table of an SM; empty where there is none. One that cannot be read is ignored with one sentence."""
    path = user_path()
    if path is None:
        return EMPTY
    try:
        own = read_user(path)["gpus"].get(str(sm))
        return EMPTY if own is None else parse(own, sm)
    except (ValueError, OSError) as error:
        logger.warning("The tuning table %s is ignored: %s.", path, " ".join(str(error).split()))
        return EMPTY


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(dump(found) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
