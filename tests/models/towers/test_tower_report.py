"""What the report says of a vision tower, against counts by hand."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.merge import test_clip
from tests.models import tiny
from tests.models.towers import test_windowed


def flops(attended, left, compared, own, rest, width, inner):
    """The formula of vidtok.models.vision, with lengths of sequences and of the segments in which tokens merge."""
    pairs = sum(n * n for n in attended)
    matched = sum(((n + 1) // 2) * (n // 2) for n in compared)
    return 2 * sum(attended) * own + 4 * width * pairs + 2 * left * rest + 2 * inner * matched


@pytest.mark.parametrize("metric", ["keys", "hidden"])
def test_sequences(metric):
    model, width = test_clip.make(), test_clip.WIDTH
    with torch.no_grad(), vidtok.attach(model, vision=vidtok.merge.ToMe(r=[8, 8, 0, 4], metric=metric)) as handle:
        empty = handle.report()
        assert empty.vision == () and not empty.times
        model(test_clip.pixels(3))
        report = handle.report()
    (tower,) = report.vision
    own, rest, inner = 4 * width * width, 2 * width * 128, width if metric == "hidden" else width // test_clip.HEADS
    tokens = [65, 57, 49, 49, 45]
    for i, block in enumerate(tower.blocks):
        now, then = tokens[i : i + 2]
        assert (block.index, block.tokens, block.merged) == (i, 3 * now, 3 * then)
        compared = [now] * 3 if now != then else []
        assert block.flops == flops([now] * 3, 3 * then, compared, own, rest, width, inner)
        assert block.flops_whole == flops([65] * 3, 3 * 65, [], own, rest, width, inner)
    assert tower.flops_removed == sum(b.flops_whole - b.flops for b in tower.blocks) > 0
    assert report.times == {"vision": tower.seconds} and tower.seconds > 0
    assert "171 147 147 135" in str(report)


def test_windows_and_frames():
    """One frame of 6×6 patches: windows of 16, 8, 8 and 4; the second and the fourth block see the frame."""
    own = test_windowed.tower(test_windowed.make("qwen2_5_vl"))
    patches, grid = tiny.patchify(tiny.frames(2, 84))
    with torch.no_grad(), vidtok.attach(own, vision="tome:r=3") as handle:
        own(patches, torch.tensor([grid]))
        (tower,) = handle.report().vision
    lengths = [[16, 8, 8, 4], [13, 5, 5, 2], [10, 3, 3, 1], [7, 2, 2, 1], [4, 1, 1, 1]]
    width = 32
    for i, block in enumerate(tower.blocks):
        segments, left = lengths[i], sum(lengths[i + 1])
        # A window of one token has nothing to compare.
        compared = [n for n, m in zip(segments, lengths[i + 1], strict=True) if n != m]
        attended = [sum(segments)] if i in (1, 3) else segments
        weights = (4 * width * width, 3 * width * 64, width, width // 2)
        assert (block.tokens, block.merged) == (sum(segments), left)
        assert block.flops == flops(attended, left, compared, *weights)
        assert block.flops_whole == flops([36] if i in (1, 3) else [16, 8, 8, 4], 36, [], *weights)


def test_times_of_the_last_pass():
    model = test_clip.make()
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=8") as handle:
        model(test_clip.pixels(1))
        first = handle.report()
        model(test_clip.pixels(4))
        second = handle.report()
    assert (first.vision[0].tokens, second.vision[0].tokens) == (65, 260)
    # What was reported stays; the report of a restored attachment is that of its last pass.
    assert handle.report() == second != first
