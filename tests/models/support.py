"""The table of docs/models.md: which family passed which tests, as pytest saw them.

``scripts/support`` runs the tests on every supported transformers with this module as a plugin of pytest, which records
what passes in support.json and writes the page again; test_support_page.py compares page, record and registry.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vidtok.models import families, versions

RECORD = Path(__file__).with_name("support.json")
PAGE = Path(__file__).parents[2] / "docs/models.md"
HOOKS = ("visual", "uni", "attn")
FORMS = ("eager", "sdpa", "flash", "static")
_NODE = re.compile(r"tests/models/test_(?:zoo|matrix)\.py::(Test\w+)::test_rows\[(.+)\]$")
_GIVEN = {"TestVisual": {"visual"}, "TestDecoder": set(), "TestFlash": {"flash"}, "TestStatic": {"static"}}


def cell(node: str) -> tuple[str, str] | None:
    """Family and ``hook/form`` that a test proves, None for other tests."""
    match = _NODE.search(node)
    if match is None or match[1] not in {*_GIVEN, "TestPlain"}:
        return None
    words = set(match[2].split("-")) | _GIVEN.get(match[1], set())
    (hook,), (form,) = words & set(HOOKS), words & set(FORMS)
    (name,) = words - {hook, form}
    return name, f"{hook}/{form}"


_outcomes: dict[str, bool] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """A test passed when all of its phases did."""
    _outcomes[report.nodeid] = report.passed and _outcomes.get(report.nodeid, True)


def pytest_sessionfinish(session: Any) -> None:
    """Write the record, in the process that has all outcomes."""
    if not hasattr(session.config, "workerinput"):
        save(_outcomes)


def load() -> dict[str, dict[str, list[str]]]:
    """Version of transformers -> family -> cells that passed."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def save(outcomes: dict[str, bool]) -> None:
    """Put what passed and failed, by node, into the record of the installed version; write the page."""
    record = load()
    mine = record.setdefault(versions.installed(), {})
    seen: dict[tuple[str, str], bool] = {}
    for node, passed in outcomes.items():
        found = cell(node)
        if found is not None:
            seen[found] = seen.get(found, True) and passed
    for (name, what), passed in seen.items():
        cells = set(mine.get(name, [])) - {what} | ({what} if passed else set())
        # A test of a refusal passes too.
        mine[name] = sorted(cells - set(excused(name, versions.installed())))
    lines = []
    for version in sorted(record):
        rows = [f"  {json.dumps(name)}: {json.dumps(cells)}" for name, cells in sorted(record[version].items())]
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def excused(name: str, version: str) -> dict[str, str]:
    """Cells that a family does not have on a version, and why."""
    from tests.models.test_matrix import upstream
    from tests.models.test_zoo import MODULES, family

    out: dict[str, str] = {}
    for hook in HOOKS:
        for form in ("flash", "static"):
            reason = upstream(name, form, version)
            if reason is not None:
                out[f"{hook}/{form}"] = f"The unreduced model does not: {reason}."
    for hook in HOOKS:
        reason = getattr(family(name), "REFUSED", {}).get(hook) if name in MODULES else None
        if reason is not None:
            out.update(dict.fromkeys((f"{hook}/{form}" for form in FORMS), f"Refused: {reason}."))
        if hook != "visual" and version.startswith("4."):
            out.setdefault(
                f"{hook}/static",
                "4.57: static caches are refused with drops inside the decoder; its layers share one length.",
            )
    return out


def table() -> str:
    """The table in Markdown, with its footnotes."""
    record = load()
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"<sup>{notes.setdefault(text, len(notes) + 1)}</sup>"

    def mark(name: str, version: str, wanted: list[str]) -> str:
        passed, excuses = set(record.get(version, {}).get(name, [])), excused(name, version)
        if all(what in excuses for what in wanted):
            return "–" + note(excuses[wanted[0]])
        if not all(what in passed or what in excuses for what in wanted):
            return "–"
        return "✓"

    def less(name: str, version: str, newest: str) -> str:
        """What an older version does not do and the newest does."""
        more = excused(name, newest)
        return "".join(dict.fromkeys(note(why) for what, why in excused(name, version).items() if what not in more))

    head = ["family", *("visual", "`uni`", "`attn`"), "eager", "sdpa", "flash", "left", "right", "dynamic", "static"]
    lines = ["| " + " | ".join([*head, *versions.SUPPORTED]) + " |", "|---" + "|:-:" * (len(head) + 2) + "|"]
    every = [f"{hook}/{form}" for hook in HOOKS for form in FORMS]
    for name in sorted(
        {name for rows in record.values() for name in rows}, key=lambda n: (families.FAMILIES[n].plain, n)
    ):
        newest = next(v for v in reversed(versions.SUPPORTED) if name in record.get(v, {}))
        by_hook = [mark(name, newest, [w for w in every if w.startswith(f"{hook}/")]) for hook in HOOKS]
        by_form = {form: mark(name, newest, [w for w in every if w.endswith(f"/{form}")]) for form in FORMS}
        growing = mark(name, newest, [w for w in every if not w.endswith("/static")])
        forms = [by_form["eager"], by_form["sdpa"], by_form["flash"], growing, growing, growing, by_form["static"]]
        known = [mark(name, v, every) + less(name, v, newest) for v in versions.SUPPORTED if name in record.get(v, {})]
        known = [""] * (len(versions.SUPPORTED) - len(known)) + known
        lines.append("| " + " | ".join([f"`{name}`", *by_hook, *forms, *known]) + " |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    return "\n".join(lines)


def refused() -> str:
    """The calls that are refused."""
    return "\n".join(
        ["| what | transformers | why |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in families.REFUSED)]
    )


def unsupported() -> str:
    """The families that are not taken."""
    rows = (f"| `{name}` | {reason} |" for name, reason in families.UNSUPPORTED)
    return "\n".join(["| family | what stands in the way |", "|---|---|", *rows])


def classes() -> str:
    """The classes of every family."""
    rows = (
        f"| `{f.name}` | {', '.join(f'`{c}`' for c in dict.fromkeys([*f.heads, f.base]))} |"
        for f in sorted(families.FAMILIES.values(), key=lambda f: (f.plain, f.name))
    )
    return "\n".join(["| family | classes |", "|---|---|", *rows])


SECTIONS = {"support": table, "classes": classes, "unsupported": unsupported, "refused": refused}


def page() -> str:
    """The page, with the generated parts as the record and the registry have them."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}: tests/models/support.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + "\n\n" + make() + "\n\n" + end + rest.split(end)[1]
    return text
