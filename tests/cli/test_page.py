"""The page shows what the plan did, escapes everything, needs no network, and is whole or absent."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import TINY
from vidtok.cli import load, measure, page, run
from vidtok.plan import Plan


class Reader(HTMLParser):
    """Squares by frame, pictures, and every address on the page."""

    def __init__(self) -> None:
        super().__init__()
        self.squares: dict[tuple[int, int, int], tuple[str, bool, int]] = {}
        self.pictures: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._frame = -1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data") and v]
        if tag == "svg":
            self._frame = int(at["data-frame"] or 0)
        elif tag == "rect":
            classes = (at["class"] or "").split()
            where = (self._frame, int(at["y"] or 0), int(at["x"] or 0))
            self.squares[where] = (classes[0], "anchor" in classes, int(at["data-o"] or 0))
        elif tag == "img":
            self.pictures.append(at["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> run.Outcome:
    """One compared run on a tiny model with pooling, then dropping."""
    options = run.Options(
        str(clip), "What <b>is</b> this?", "tome:ratio=0.6+uniform:ratio=0.7", max_frames=8, dtype="float32",
        max_new_tokens=3, compare=True,
    )  # fmt: skip
    return run.execute(options, lambda *_: None, lambda: load.random_model(**TINY, max_pixels=150 * 150))


def test_squares_are_the_trace_of_the_executed_plan(outcome: run.Outcome) -> None:
    sample = outcome.sample
    t, h, w = sample.grid_thw
    squares = read(page.render(outcome)).squares
    assert len(squares) == t * h * w == sample.tokens_in == outcome.visual_in
    trace = sample.plan.trace([sample.grid_thw])
    seen = {}
    for output, members in enumerate(trace):
        for _, frame, row, column in members:
            seen[frame, row, column] = ("merged" if len(members) > 1 else "kept", output)
    for where, (state, _, output) in squares.items():
        assert (state, output) == seen.get(where, ("dropped", -1))
    anchors = {(f, r, c) for (f, r, c), square in squares.items() if square[1]}
    assert sorted((f * h + r) * w + c for f, r, c in anchors) == sorted(sample.plan.anchor.tolist())
    states = [s[0] for s in squares.values()]
    assert all(states.count(s) > 0 for s in ("kept", "merged", "dropped"))
    assert len({s[2] for s in squares.values()} - {-1}) == sample.tokens_out == outcome.visual_out


def test_another_plan_gives_another_picture(outcome: run.Outcome) -> None:
    """The squares follow the plan and nothing else."""
    sample = outcome.sample
    n = sample.tokens_in
    index = torch.arange(0, n, 3)
    cu = torch.tensor([0, n], dtype=torch.int32)
    plan = Plan.gather(index, cu, torch.tensor([0, len(index)], dtype=torch.int32), n)
    changed = replace(sample, plan=plan, tokens_out=len(index))
    report = replace(outcome.reduced.report, samples=[changed])
    squares = read(page.render(replace(outcome, reduced=replace(outcome.reduced, report=report)))).squares
    _, h, w = sample.grid_thw
    kept = sorted((f * h + r) * w + c for (f, r, c), s in squares.items() if s[0] == "kept")
    assert kept == index.tolist() and {s[0] for s in squares.values()} == {"kept", "dropped"}


def test_pictures_are_the_frames(outcome: run.Outcome) -> None:
    pictures = read(page.render(outcome)).pictures
    assert len(pictures) == outcome.sample.grid_thw[0]
    for f, source in enumerate(pictures):
        head, data = source.split(",")
        assert head == "data:image/jpeg;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        frame = outcome.video.frames[2 * f]
        assert image.size == (frame.shape[2], frame.shape[1])
        shown = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*frame.shape[1:], 3)
        assert (shown.permute(2, 0, 1).float() - frame.float()).abs().mean() < 6


def test_numbers_of_both_runs(outcome: run.Outcome) -> None:
    text = " ".join(read(page.render(outcome)).text.split())
    assert outcome.full is not None
    for value in (outcome.full.total, outcome.reduced.total, outcome.full.first_token, outcome.reduced.times["decide"]):
        assert page.number(value, "s") in text
    assert "weights of this model are random" in text
    alone = " ".join(read(page.render(replace(outcome, full=None, full_answer=None))).text.split())
    assert "unreduced" not in alone and page.number(outcome.reduced.total, "s") in alone


def test_a_busy_machine_is_named(outcome: run.Outcome) -> None:
    """Equal work in unequal time is said, not passed off as a speed-up."""
    assert outcome.full is not None

    def seconds(measured: measure.Measured, vision: float) -> measure.Measured:
        return replace(measured, times={**measured.times, "vision": vision})

    busy = replace(outcome, full=seconds(outcome.full, 3.0), reduced=seconds(outcome.reduced, 1.0))
    calm = replace(outcome, full=seconds(outcome.full, 1.1), reduced=seconds(outcome.reduced, 1.0))
    assert "The machine was busy" in page.render(busy) and "3.00 s" in (busy.disturbed or "")
    assert calm.disturbed is None and "busy" not in page.render(calm)
    assert replace(busy, full=None).disturbed is None


def test_medians_by_stage(outcome: run.Outcome) -> None:
    one = outcome.reduced
    runs = [replace(one, times=dict.fromkeys(measure.STAGES, float(n)), peak_bytes=n) for n in (5, 1, 2)]
    typical = run._typical(runs)
    assert typical.total == 10.0 and typical.first_token == 8.0 and typical.peak_bytes == 5


def test_nothing_comes_from_outside(outcome: run.Outcome) -> None:
    html = page.render(outcome)
    reader = read(html)
    assert all(a.startswith("data:image/jpeg;base64,") for a in reader.addresses)
    assert "default-src 'none'" in html and not re.search(r"https?://|@import|url\(", html)


def test_everything_is_escaped(outcome: run.Outcome) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
    plain = read(page.render(outcome)).tags
    changed = replace(
        outcome,
        options=replace(outcome.options, question=evil, video=f"/tmp/{evil.replace('/', '')}.mp4"),
        answer=evil,
        full_answer=evil,
        visual=evil,
        name=evil,
        device=evil,
    )
    html = page.render(changed)
    assert read(html).tags == plain and evil not in html


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    page.write(target, "one")
    page.write(target, "two")
    assert target.read_text() == "two" and list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o044 == 0o044 & ~_umask()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="space"):
        page.write(target, "three")
    assert target.read_text() == "two" and list(tmp_path.iterdir()) == [target]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_overlapping_windows_and_empty_frames() -> None:
    """A token in two outputs is drawn with the first; a frame without outputs is all dropped."""
    cu_in, cu_out = torch.tensor([0, 6], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    member, offset = torch.tensor([0, 1, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    plan = Plan(cu_in, cu_out, torch.tensor([0, 2], dtype=torch.int32), member, offset, torch.full((4,), 0.5), 6)
    first, second = page.cells(plan.validate(), (2, 1, 3))
    assert [(c.state, c.output, c.anchor) for c in first] == [
        ("merged", 0, True),
        ("merged", 0, False),
        ("merged", 1, True),
    ]
    assert {c.state for c in second} == {"dropped"}
    assert page.outline(first, 1, 3) == "M2 0v1" and page.outline(second, 1, 3) == ""


@pytest.mark.parametrize(
    "value,unit,text",
    [
        (2300, "tokens", "2 300"),
        (0.0123, "s", "12 ms"),
        (0.00123, "s", "1.23 ms"),
        (1.234, "s", "1.23 s"),
        (12.34, "s", "12.3 s"),
        (5 * 2**30, "B", "5.00 GiB"),
        (300 * 2**20, "B", "300 MiB"),
        (None, "s", "–"),
    ],
)
def test_numbers_as_people_read_them(value: float | None, unit: str, text: str) -> None:
    assert page.number(value, unit).replace("\u202f", " ").replace("\u2009", " ") == text
