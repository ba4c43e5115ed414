"""The table of docs/vision.md: families of vision towers and the versions of transformers that have them.

``python -m tests.models.towers.page`` writes it; test_vision_page.py compares it with the registry and the record.
"""

from __future__ import annotations

import json
from pathlib import Path

from vidtok.models import towers, versions

PAGE = Path(__file__).parents[3] / "docs/vision.md"
BEGIN, END = "<!-- towers: tests/models/towers/page.py -->", "<!-- end of towers -->"


def table() -> str:
    """The table in Markdown."""
    record = json.loads(Path(versions.__file__).with_name("fingerprints.json").read_text(encoding="utf-8"))
    lines = ["| family | towers | " + " | ".join(versions.SUPPORTED) + " |", "|---|---" + "|:-:" * 3 + "|"]
    for family in towers.FAMILIES:
        rows = [
            record[name] for name in (f"{family.name}.{tower}.forward" for tower in family.towers) if name in record
        ]
        if rows:
            marks = ["✓" if any(row[i] for row in rows) else "" for i in range(len(versions.SUPPORTED))]
            names = ", ".join(f"`{tower}`" for tower in family.towers)
            lines.append(f"| `{family.name}` | {names} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it is to be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n\n" + table() + "\n\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
