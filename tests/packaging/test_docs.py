"""What the README says is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [body for name, body in fenced if name == language]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    checks = re.search(r"^CHECKS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert checks
    targets |= {f"check-{name}" for name in checks[1].split()}
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), ""):
            for target in re.findall(r"^make ([\w-]+)", block, re.M):
                assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("block", [b for b in blocks(README, "python") if "attach" not in b and "Trainer(" not in b])
def test_python_block_runs(block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT / "python")
    assert done.returncode == 0, done.stderr


def test_specs_parse() -> None:
    from vidtok import spec

    table = README.split("| spec |")[1].split("\n\n")[0]
    specs = [s for row in table.splitlines()[2:] for s in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(specs) >= 9
    for text in specs:
        spec.parse(text)


def test_operator_table_is_complete() -> None:
    from vidtok import ops

    named = set(re.findall(r"`(\w+)`", README.split("| operator |")[1].split("\n\n")[0]))
    assert named == set(ops.__all__)


def test_command_lines_use_real_options() -> None:
    lines = re.findall(r"^vidtok (.*)$", "\n".join(blocks(README, "")), re.M)
    assert lines
    for line in lines:
        command = [sys.executable, "-m", "vidtok", line.split()[0], "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
        assert done.returncode == 0, done.stderr
        for option in re.findall(r"--[a-z-]+", line):
            assert option in done.stdout, f"vidtok {line.split()[0]} {option}"


def test_pins_in_the_readme() -> None:
    pins = (ROOT / "constraints/dev.txt").read_text(encoding="utf-8")
    row = re.search(r"^\| torch \| (.*?) \|", README, re.M)
    models = re.search(r"^\| transformers \| (.*?) \|", README, re.M)
    assert row and models
    assert re.search(r"^torch==(\S+)", pins, re.M)[1] in row[1]
    overlays = {p.stem.removeprefix("transformers-") for p in (ROOT / "constraints").glob("transformers-*.txt")}
    current = re.search(r"^transformers==(\S+) ; python_full_version >= '3.11'", pins, re.M)
    assert current
    assert set(models[1].split(", ")) == overlays | {current[1]}
