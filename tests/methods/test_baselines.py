"""uniform, random, evs, dtd, pool and tome against fp64 loops, and their count rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods import oracle
from tests.methods.helpers import as_frames, check_same, make_video, outputs
from vidtok import methods, ops
from vidtok.methods.tome import rounds

GRIDS = [(8, 6, 6), (1, 4, 5), (13, 5, 4), (2, 3, 3)]


def batch(dtype=torch.float64):
    parts = [make_video(i, g) for i, g in enumerate(GRIDS)]
    return torch.cat(parts).to(dtype), [as_frames(x, g) for x, g in zip(parts, GRIDS)]


class TestUniform:
    @pytest.mark.parametrize(
        ("n", "k", "expected"),
        [
            (10, 5, [0, 2, 4, 6, 9]),
            (16, 8, [0, 2, 4, 6, 8, 10, 12, 15]),
            (9, 1, [0]),
            (3, 3, [0, 1, 2]),
            (2, 9, [0, 1]),
        ],
    )
    def test_by_hand(self, n, k, expected):
        assert methods.uniform(torch.zeros(n, 1), [(1, 1, n)], k=k).anchor.tolist() == expected

    @given(st.integers(1, 500), st.integers(1, 500))
    def test_integers(self, n, k):
        k = min(n, k)
        check_same(methods.uniform(torch.zeros(n, 1), [(n, 1, 1)], k=k), [oracle.uniform(n, k)])

    def test_each_video_by_itself(self):
        plan = methods.uniform(torch.zeros(30, 2), [(1, 2, 5), (2, 2, 5)], ratio=0.3)
        check_same(plan, [oracle.uniform(10, 3), oracle.uniform(20, 6)])

    @pytest.mark.parametrize("options", [{"ratio": 0}, {"ratio": 1.5}, {"ratio": float("nan")}, {"ratio": True}])
    def test_refuses_ratio(self, options):
        with pytest.raises(ValueError, match=r"expected ratio in \(0, 1\]"):
            methods.uniform(torch.zeros(4, 1), [(1, 2, 2)], **options)

    @pytest.mark.parametrize("options", [{}, {"ratio": 0.5, "k": 2}])
    def test_exactly_one(self, options):
        with pytest.raises(ValueError, match="expected exactly one of ratio and k"):
            methods.uniform(torch.zeros(4, 1), [(1, 2, 2)], **options)


class TestRandom:
    def test_is_a_draw_without_replacement(self):
        seen = torch.zeros(12, dtype=torch.int64)
        for seed in range(200):
            plan = methods.random(torch.zeros(12, 1), [(1, 3, 4)], k=3, seed=seed).validate()
            seen[plan.anchor.long()] += 1
        assert seen.sum() == 600 and seen.min() > 20 and seen.max() < 80

    def test_seed_decides(self):
        x, grid = torch.zeros(100, 1), [(1, 10, 10)]
        a, b, c = (methods.random(x, grid, ratio=0.5, seed=s).anchor.tolist() for s in (1, 1, 2))
        assert a == b != c

    def test_global_generator_is_untouched(self):
        state = torch.get_rng_state()
        methods.random(torch.zeros(100, 1), [(1, 10, 10)], k=7)
        assert torch.equal(torch.get_rng_state(), state)

    def test_equal_videos_keep_equal_tokens(self):
        plan = methods.random(torch.zeros(24, 1), [(1, 3, 4)] * 2, k=5)
        assert (plan.anchor[:5] + 12).tolist() == plan.anchor[5:].tolist()

    def test_refuses_seed(self):
        for seed in (-1, 2**63, 0.5):
            with pytest.raises(ValueError, match="expected seed"):
                methods.random(torch.zeros(4, 1), [(1, 2, 2)], k=1, seed=seed)


class TestEvs:
    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.77, 1.0])
    def test_against_oracle(self, ratio):
        x, frames = batch()
        check_same(methods.evs(x, GRIDS, ratio=ratio), [oracle.evs(v, ratio) for v in frames])

    @pytest.mark.parametrize(
        ("t", "ratio", "expected"), [(1, 0.5, 100), (2, 0.4, 100), (10, 0.3, 300), (10, 0.29, 290), (3, 0.99, 297)]
    )
    def test_count(self, t, ratio, expected):
        assert methods.count("evs", [(t, 10, 10)], ratio=ratio) == [expected]

    def test_ties_go_to_the_earlier(self):
        plan = methods.evs(torch.ones(24, 8), [(4, 2, 3)], ratio=0.5)
        assert plan.anchor.tolist() == list(range(12))

    def test_nan_goes_first(self):
        x = torch.ones(8, 4)
        x[1] = float("nan")
        assert methods.evs(x, [(8, 1, 1)], ratio=0.75).anchor.tolist() == [0, 3, 4, 5, 6, 7]


class TestDtd:
    @pytest.mark.parametrize("threshold", [-1, 0.0, 0.5, 0.9, 1])
    def test_absolute(self, threshold):
        x, frames = batch()
        check_same(methods.dtd(x, GRIDS, threshold=threshold), [oracle.dtd(v, threshold, False) for v in frames])

    @pytest.mark.parametrize("threshold", [0, 0.3, 0.5, 1])
    def test_relative(self, threshold):
        x, frames = batch()
        plan = methods.dtd(x, GRIDS, threshold=threshold, relative=True)
        check_same(plan, [oracle.dtd(v, threshold, True) for v in frames])

    def test_slow_drift_is_dropped_whole(self):
        angle = torch.arange(10) * 0.1
        x = torch.stack([angle.cos(), angle.sin()], 1)
        assert methods.dtd(x, [(10, 1, 1)], threshold=0.9).anchor.tolist() == [0]

    def test_threshold_is_strict(self):
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert methods.dtd(x, [(2, 1, 1)], threshold=0.0).num_out == 2
        assert methods.dtd(torch.ones(2, 2), [(2, 1, 1)], threshold=1.0).num_out == 2

    def test_nan_stays(self):
        x = torch.ones(6, 4)
        x[3] = float("nan")
        assert methods.dtd(x, [(3, 1, 2)], threshold=0.5).anchor.tolist() == [0, 1, 3, 5]
        assert methods.dtd(x, [(3, 1, 2)], threshold=0.5, relative=True).anchor.tolist() == [0, 1, 3, 5]

    def test_refuses(self):
        for options in ({"threshold": 1.5}, {"threshold": -0.5, "relative": True}, {"threshold": "x"}):
            with pytest.raises(ValueError, match="expected threshold in"):
                methods.dtd(torch.zeros(4, 1), [(1, 2, 2)], **options)
        with pytest.raises(TypeError, match="relative as true or false"):
            methods.dtd(torch.zeros(4, 1), [(1, 2, 2)], threshold=0.5, relative=1)


class TestPool:
    @pytest.mark.parametrize("options", [{"level": v} for v in (1, 1.5, 2, 3, 4, 6.4, 100)] + [{"out_hw": (3, 2)}])
    def test_against_the_operator(self, options):
        x, _ = batch()
        plan = methods.pool(x, GRIDS, **options).validate()
        pooled = ops.pool_packed(x, GRIDS, **options)
        torch.testing.assert_close(ops.plan_apply(plan, x), pooled.x, rtol=1e-6, atol=1e-6)
        assert plan.lengths_out() == pooled.grid_thw.prod(1).tolist()

    @given(st.tuples(*[st.integers(1, 9)] * 3), st.floats(1, 10))
    def test_against_oracle(self, grid, level):
        t, h, w = grid
        _, oh, ow = methods.METHODS["pool"].out_grid(grid, level=level)
        check_same(methods.pool(torch.zeros(t * h * w, 1), [grid], level=level), [oracle.pool(t, h, w, oh, ow)])

    @pytest.mark.parametrize(
        ("side", "level", "expected"),
        [(18, 4, 4), (26, 4, 6), (27, 6, 4), (37, 2, 18), (24, 9.6, 2), (16, 32, 1), (16, 3, 5)],
    )
    def test_half_to_even(self, side, level, expected):
        assert methods.count("pool", [(1, side, 1)], level=level) == [expected]

    def test_level_one_is_the_identity(self):
        x, _ = batch(torch.float32)
        plan = methods.pool(x, GRIDS, level=1)
        assert plan.is_gather and torch.equal(ops.plan_apply(plan, x), x)

    def test_smaller_sides_stay(self):
        plan = methods.pool(torch.zeros(2 * 12 + 100, 1), [(2, 3, 4), (1, 10, 10)], out_hw=(5, 3)).validate()
        assert plan.lengths_out() == [18, 15]

    @pytest.mark.parametrize(
        "options", [{"level": 0.5}, {"level": float("inf")}, {"out_hw": (0, 2)}, {"out_hw": (2,)}, {"out_hw": 3}, {}]
    )
    def test_refuses(self, options):
        with pytest.raises(ValueError, match="expected"):
            methods.pool(torch.zeros(4, 1), [(1, 2, 2)], **options)


class TestTome:
    @pytest.mark.parametrize("k", [1, 3, 10, 19, 50])
    @pytest.mark.parametrize("channels", [32, 20])
    def test_against_oracle(self, k, channels):
        parts = [make_video(i, g, channels) for i, g in enumerate(GRIDS)]
        expected = [oracle.tome(as_frames(x, g), k) for x, g in zip(parts, GRIDS)]
        check_same(methods.tome(torch.cat(parts), GRIDS, k=k), expected)

    @pytest.mark.parametrize(
        ("n", "k", "expected"),
        [
            (729, 16, [364, 182, 91, 46, 23, 7]),
            (256, 16, [128, 64, 32, 16]),
            (196, 16, [98, 49, 24, 9]),
            (729, 64, [364, 182, 91, 28]),
            (576, 16, [288, 144, 72, 36, 18, 2]),
            (10, 16, []),
        ],
    )
    def test_schedule(self, n, k, expected):
        assert rounds(n, k=k) == expected

    def test_other_targets(self):
        assert rounds(100, ratio=0.5) == [50]
        assert rounds(100, r=60) == [50, 10]
        assert rounds(100, r=500)[-1] == 1 and sum(rounds(100, r=500)) == 99
        assert rounds(20, r=[8, 8, 4]) == [8, 6, 3]
        assert rounds(20, r=[0]) == []

    def test_list_of_rounds(self):
        x = make_video(0, (3, 6, 6))
        two = methods.tome(x, [(3, 6, 6)], r=[18, 6])
        one = methods.tome(x, [(3, 6, 6)], r=24)
        assert two.num_out == one.num_out == 36
        torch.testing.assert_close(ops.plan_apply(two, x), ops.plan_apply(one, x))

    def test_metric_of_features(self):
        # Two channels a group: the grouped metric cannot tell channel 0 of token 0 from channel 2 of token 1.
        x = torch.zeros(4, 32)
        x[0, 0] = x[1, 2] = x[3, 1] = 1
        groups = methods.tome(x, [(1, 2, 2)], r=1)
        features = methods.tome(x + x.roll(3, 0) * 0.1, [(1, 2, 2)], r=1, metric="features")
        assert outputs(groups)[0][0] == (1, {1: 0.5, 0: 0.5})
        assert outputs(features)[0][0][0] == 0

    def test_plan_moves_what_the_rounds_merged(self):
        x = make_video(5, (2, 6, 6)).float()
        frames = x.view(2, 36, 32)
        size = None
        for r in rounds(36, k=7):
            metric = frames.view(2, -1, 16, 2).mean(2)
            frames, size, _ = ops.bipartite_merge(frames, metric, r, size=size)
        plan = methods.tome(x, [(2, 6, 6)], k=7)
        moved = ops.plan_apply(plan, x)
        assert moved.shape == (14, 32)
        # The rounds keep their own order.
        for f in range(2):
            distance = torch.cdist(moved[7 * f : 7 * f + 7].double(), frames[f].double())
            assert distance.min(1).values.max() < 1e-5 and len(set(distance.argmin(1).tolist())) == 7

    @pytest.mark.parametrize(
        "options", [{}, {"r": 8, "k": 3}, {"r": -1}, {"r": [1, -1]}, {"r": (8, -1)}, {"k": 0}, {"k": 2, "metric": "x"}]
    )
    def test_refuses(self, options):
        with pytest.raises(ValueError, match="expected"):
            methods.tome(torch.zeros(4, 16), [(1, 2, 2)], **options)
