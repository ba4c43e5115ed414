"""docs/vision.md says which towers there are, and what options do."""

from __future__ import annotations

from dataclasses import fields

import transformers

from tests.models.towers import dense, page
from vidtok.merge import Schedule, ToMe, inflected
from vidtok.merge.spec import METHODS
from vidtok.models import versions


def test_the_table_is_generated():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python -m tests.models.towers.page"


def test_the_dense_families_are_in_it():
    rows = {line.split("|")[1].strip(" `"): line.split("|")[3:6] for line in page.table().splitlines()[2:]}
    column = versions.SUPPORTED.index(transformers.__version__)
    for kind in dense.KINDS:
        assert (rows[kind][column].strip() == "✓") == dense.available(kind), kind


def test_options_and_schedules():
    text = page.PAGE.read_text(encoding="utf-8")
    table = text.split("### Options")[1].split("### Schedules")[0]
    assert {f.name for f in fields(ToMe)} == set(METHODS["tome"][1])
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == [
        f.name for f in fields(ToMe)
    ]
    assert f"`{' '.join(map(str, inflected(12, 8, -1)))}`, {sum(inflected(12, 8, -1))} in place of 96" in text
    rows = [line.strip("| ").split(" | ") for line in text.split("| tokens |")[1].split("\n\n")[0].splitlines()[2:]]
    assert len(rows) == 6
    for tokens, layers, r, left in (map(int, row) for row in rows):
        assert tokens - sum(Schedule(r=r).counts(layers, tokens, 1)) == left
