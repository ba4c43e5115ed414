"""PruneVid stage 1 against fp64 loops, its counts, and its odd corners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods import oracle
from tests.methods.helpers import as_frames, check_same, equal, make_video, outputs
from vidtok import methods, ops
from vidtok.methods.prunevid import group_count, refine

GRIDS = [(8, 6, 6), (1, 4, 5), (13, 5, 4), (2, 3, 3)]


class TestAgainstOracle:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize(
        "options", [{}, {"tau": 0.95, "cluster_ratio": 0.3}, {"temporal_segment_ratio": 0.5, "k": 3}, {"tau": -1}]
    )
    def test_one_video(self, grid, options):
        x = make_video(7, grid)
        expected, _ = oracle.prunevid(as_frames(x, grid), **options)
        check_same(methods.prunevid(x, [grid], **options), [expected])

    def test_fp32_decides_as_fp64(self):
        x = torch.cat([make_video(i, g) for i, g in enumerate(GRIDS)])
        x = (x * 64).round() / 64
        assert equal(methods.prunevid(x.float(), GRIDS), methods.prunevid(x, GRIDS))

    def test_several_videos(self):
        parts = [make_video(i, g) for i, g in enumerate(GRIDS)]
        expected = [oracle.prunevid(as_frames(x, g))[0] for x, g in zip(parts, GRIDS)]
        check_same(methods.prunevid(torch.cat(parts), GRIDS), expected)

    def test_has_static_and_dynamic_groups(self):
        grid = (8, 6, 6)
        rows = outputs(methods.prunevid(make_video(7, grid), [grid]))[0]
        frames = [{m // 36 for m in members} for _, members in rows]
        assert any(len(f) > 1 for f in frames) and any(len(f) == 1 for f in frames)


class TestRefine:
    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            ([0], [1]),
            ([0, 1, 2, 3], [4]),
            ([0, 0, 1, 1], [2, 2]),
            ([0, 0, 1, 0], [4]),
            ([0, 0, 1, 2, 2, 2], [2, 4]),
            ([0, 0, 1, 2, 2], [3, 2]),
            ([0, 0, 1, 1, 0, 0], [2, 2, 2]),
            ([3, 0, 0, 0, 1, 0], [6]),
            ([0, 0, 5, 1, 1, 6, 2, 2, 2], [3, 2, 4]),
            ([0, 0, 5, 0, 1, 1, 1], [2, 5]),
            # Filling the first stretch joins two runs, which together win the second.
            ([0, 0, 5, 0, 0, 6, 1, 1, 1], [6, 3]),
        ],
    )
    def test_by_hand(self, labels, expected):
        assert refine(labels) == expected == oracle.segments(labels)

    @given(st.lists(st.integers(0, 4), min_size=1, max_size=24))
    def test_as_the_loop(self, labels):
        got = refine(labels)
        assert got == oracle.segments(labels)
        assert sum(got) == len(labels) and (len(labels) == 1 or min(got) > 1)


class TestCounts:
    @pytest.mark.parametrize(
        ("n", "ratio", "expected"),
        [(0, 0.5, 0), (14, 0.5, 14), (15, 0.5, 7), (221, 0.5, 110), (15, 0.01, 1), (15, 1.0, 15)],
    )
    def test_of_a_group(self, n, ratio, expected):
        assert group_count(n, ratio) == expected

    def test_all_dynamic(self):
        # Eight frames of 13 × 17 with nothing static: 8 · int(110.5).
        x = torch.randn(8 * 221, 16, generator=torch.Generator().manual_seed(0))
        plan = methods.prunevid(x, [(8, 13, 17)])
        assert plan.num_out == 880 and plan.length_out == 880

    def test_all_static(self):
        # Two halves that stand still: one segment each, 49 slots each.
        scenes = torch.randn(2, 49, 16, generator=torch.Generator().manual_seed(0))
        x = scenes.repeat_interleave(4, 0).reshape(8 * 49, 16)
        plan = methods.prunevid(x, [(8, 7, 7)])
        assert plan.num_out == 2 * int(49 * 0.5)
        # Copies of one frame are one token: means over members and frames are the centre's scene tokens.
        assert {len(m) % 4 for _, m in outputs(plan)[0]} == {0}

    def test_formula(self):
        grid = (13, 5, 4)
        x = make_video(3, grid)
        _, windows = oracle.prunevid(as_frames(x, grid))
        static = ops.adjacent_similarity(x, [grid], to="window", window=windows) > 0.8
        expected = 0
        for s, w in enumerate(windows):
            n = int(static[s * 20 : (s + 1) * 20].sum())
            expected += group_count(n, 0.5) + w * group_count(20 - n, 0.5)
        assert methods.prunevid(x, [grid]).num_out == expected


class TestCorners:
    @pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 7])
    def test_short_videos(self, frames):
        grid = (frames, 4, 4)
        expected, windows = oracle.prunevid(as_frames(make_video(1, grid), grid))
        plan = methods.prunevid(make_video(1, grid), [grid])
        check_same(plan, [expected])
        if frames == 1:
            assert windows == [1] and plan.num_out == 8

    def test_small_groups_stay(self):
        x = torch.randn(4 * 14, 8, generator=torch.Generator().manual_seed(0))
        plan = methods.prunevid(x, [(4, 2, 7)])
        assert plan.is_gather and plan.num_out == 56

    def test_ratio_one_without_static_is_the_identity(self):
        x = torch.randn(4 * 20, 8, generator=torch.Generator().manual_seed(0))
        plan = methods.prunevid(x, [(4, 4, 5)], tau=1.0, cluster_ratio=1.0)
        assert torch.equal(ops.plan_apply(plan, x), x)

    def test_ratio_one_averages_what_is_static(self):
        x = torch.ones(4 * 20, 8) * torch.arange(1.0, 5.0).repeat_interleave(20).unsqueeze(1)
        plan = methods.prunevid(x, [(4, 4, 5)], cluster_ratio=1.0)
        assert plan.num_out == 20
        assert torch.equal(ops.plan_apply(plan, x), torch.full((20, 8), 2.5))
        assert plan.anchor.tolist() == list(range(20))

    def test_threshold_is_strict(self):
        # Orthogonal tokens: mean cosine exactly 0.
        x = torch.eye(4).unsqueeze(1).expand(4, 4, 4).reshape(16, 4)
        assert methods.prunevid(x, [(4, 2, 2)], tau=0.0).num_out == 16
        assert methods.prunevid(x, [(4, 2, 2)], tau=-0.5).num_out == 4

    def test_zero_tokens_are_dynamic(self):
        plan = methods.prunevid(torch.zeros(4 * 4, 8), [(4, 2, 2)])
        assert plan.num_out == 16

    @pytest.mark.parametrize(
        "options",
        [{"tau": 1.5}, {"cluster_ratio": 0}, {"cluster_ratio": 1.1}, {"temporal_segment_ratio": -1}, {"k": 0}],
    )
    def test_refuses(self, options):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))} "):
            methods.prunevid(torch.zeros(4, 4), [(1, 2, 2)], **options)
