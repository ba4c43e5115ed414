"""docs/models.md lists exactly the classes that are supported and the calls that are refused."""

from __future__ import annotations

from pathlib import Path

from vidtok.models import families

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


def test_classes():
    listed = {row[0].strip("`"): row[1] for row in ROWS if row[0].startswith("`")}
    assert listed == {
        name: f"`{family.heads[0]}`, `{family.base}`"
        for name, family in families.FAMILIES.items()
        if name in families.CORE
    }


def test_refusals():
    listed = [tuple(row) for row in ROWS if len(row) == 3 and row[0] != "what" and not set(row[0]) <= {"-"}]
    assert listed == list(families.REFUSED)
