"""docs/models.md says what the tests found, what is registered and what is refused."""

from __future__ import annotations

import pytest
import transformers

from tests.models import support, tiny
from tests.models.test_matrix import PLAIN
from tests.models.test_zoo import TAKEN
from vidtok.models import families, versions


def test_the_page_is_generated():
    assert support.PAGE.read_text(encoding="utf-8") == support.page(), "run scripts/support"


@pytest.mark.parametrize("name", [*TAKEN, *PLAIN])
def test_every_family_passed_or_says_why_not(name):
    version = transformers.__version__
    passed, excused = support.load()[version].get(name, []), support.excused(name, version)
    wanted = {f"{hook}/{form}" for hook in support.HOOKS for form in support.FORMS}
    assert set(passed) == wanted - set(excused)


def test_families():
    record = support.load()
    assert sorted(record) == sorted(versions.SUPPORTED)
    assert {name for rows in record.values() for name in rows} == set(families.FAMILIES)
    assert not set(families.FAMILIES) & {name for name, _ in families.UNSUPPORTED}
    assert all(set(families.CORE) <= set(rows) for rows in record.values())
    assert set(record[transformers.__version__]) == {*TAKEN, *PLAIN}
    table = support.table()
    assert table.count("\n| `") == len(families.FAMILIES)
    if tiny.VERSION >= (5, 23):
        assert sum(line.split("|")[2].strip() == "✓" for line in table.splitlines() if line.startswith("| `")) >= 25


def test_tests_name_their_cells():
    at = "tests/models/test_{}.py::{}::test_rows[{}]".format
    assert support.cell(at("zoo", "TestVisual", "qwen2_vl-sdpa")) == ("qwen2_vl", "visual/sdpa")
    assert support.cell(at("zoo", "TestDecoder", "eager-attn-qwen2_vl")) == ("qwen2_vl", "attn/eager")
    assert support.cell(at("matrix", "TestFlash", "qwen2_vl-uni")) == ("qwen2_vl", "uni/flash")
    assert support.cell(at("matrix", "TestPlain", "qwen2-uni-static")) == ("qwen2", "uni/static")
    assert support.cell(at("zoo", "TestUnreduced", "qwen2_vl")) is None


def test_a_failure_takes_the_mark_away(tmp_path, monkeypatch):
    monkeypatch.setattr(support, "RECORD", tmp_path / "support.json")
    monkeypatch.setattr(support, "page", lambda: support.PAGE.read_text(encoding="utf-8"))
    at = "tests/models/test_zoo.py::TestVisual::test_rows[qwen2_vl-{}]".format
    support.save({at("sdpa"): True, at("eager"): True})
    support.save({at("sdpa"): False})
    assert support.load() == {transformers.__version__: {"qwen2_vl": ["visual/eager"]}}
