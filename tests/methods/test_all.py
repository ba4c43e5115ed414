"""What every method promises: each video by itself, determinism, exact counts, valid plans on any input."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.helpers import equal, make_video
from vidtok import Plan, methods, ops

CASES = [
    ("uniform", {"ratio": 0.3}),
    ("uniform", {"k": 7}),
    ("random", {"ratio": 0.3}),
    ("random", {"k": 7, "seed": 5}),
    ("evs", {"ratio": 0.4}),
    ("dtd", {"threshold": 0.6}),
    ("dtd", {"threshold": 0.4, "relative": True}),
    ("prunevid", {}),
    ("prunevid", {"tau": 0.95, "cluster_ratio": 0.25, "temporal_segment_ratio": 0.5, "k": 3}),
    ("pool", {"level": 2}),
    ("pool", {"out_hw": (3, 2)}),
    ("tome", {"k": 5}),
    ("tome", {"ratio": 0.6}),
    ("tome", {"r": [3, 2], "metric": "features"}),
]
IDS = [f"{name}-{','.join(map(str, options.values()))}" for name, options in CASES]
WHOLE = [
    ("uniform", {"ratio": 1.0}),
    ("random", {"ratio": 1.0}),
    ("evs", {"ratio": 1.0}),
    ("dtd", {"threshold": 1.0}),
    ("dtd", {"threshold": 0.0, "relative": True}),
    ("prunevid", {"tau": 1.0, "cluster_ratio": 1.0}),
    ("pool", {"level": 1}),
    ("tome", {"ratio": 1.0}),
    ("tome", {"r": 0}),
]
GRIDS = [(8, 6, 6), (1, 4, 5), (13, 5, 4), (2, 3, 3), (3, 5, 4)]
each = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def run(name, options, x, grids) -> Plan:
    return getattr(methods, name)(x, grids, **options)


def videos(dtype=torch.float32):
    return [make_video(i, g).to(dtype) for i, g in enumerate(GRIDS)]


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_docstring_example(name):
    module = importlib.import_module(f"vidtok.methods.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_every_method_is_here():
    assert {name for name, _ in CASES} == set(methods.METHODS) == {name for name, _ in WHOLE}


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alone_as_in_a_batch(name, options, dtype):
    parts = videos(dtype)
    together = run(name, options, torch.cat(parts), GRIDS).validate()
    alone = [run(name, options, x, [g]).validate() for x, g in zip(parts, GRIDS)]
    assert equal(together, Plan.cat(alone))


@each
def test_counts_from_shapes(name, options):
    plan = run(name, options, torch.cat(videos()), GRIDS)
    counts = methods.count(name, GRIDS, **options)
    assert (counts is None) == (name == "prunevid" or options == {"threshold": 0.6})
    assert counts is None or counts == plan.lengths_out()
    one = run(name, options, videos()[0], GRIDS[:1])
    assert counts is None or one.length_out == one.num_out


@pytest.mark.parametrize(("name", "options"), WHOLE)
def test_ratio_one_is_the_identity(name, options):
    x = torch.randn(sum(t * h * w for t, h, w in GRIDS), 32, generator=torch.Generator().manual_seed(0))
    plan = run(name, options, x, GRIDS).validate()
    assert equal(plan, Plan.identity([t * h * w for t, h, w in GRIDS]))
    assert torch.equal(ops.plan_apply(plan, x), x)


@each
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 0.0, 3.0e38])
@pytest.mark.parametrize("where", ["one", "frame", "all"])
def test_any_value_gives_a_valid_plan(name, options, fill, where):
    x = torch.cat(videos())
    x[{"one": slice(40, 41), "frame": slice(36, 72), "all": slice(None)}[where]] = fill
    plan = run(name, options, x, GRIDS).validate()
    counts = methods.count(name, GRIDS, **options)
    assert counts is None or counts == plan.lengths_out()


@each
def test_equal_frames_decide_by_index(name, options):
    frame = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    x = frame.expand(6, -1, -1).reshape(120, 32)
    grid = [(6, 4, 5)]
    plan = run(name, options, x, grid).validate()
    assert equal(plan, run(name, options, x.clone(), grid))
    # A scale by a power of two and another precision leave the decisions as they are.
    exact = (x * 4).round() / 4
    again = run(name, options, exact, grid)
    assert equal(again, run(name, options, exact.double(), grid))
    if not name.startswith("prunevid"):
        assert equal(again, run(name, options, exact.bfloat16(), grid))


@each
def test_threads_do_not_matter(name, options):
    x = torch.cat(videos())
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.append(run(name, options, x, GRIDS))
    finally:
        torch.set_num_threads(before)
    assert equal(*plans)


@each
def test_inputs_and_generators_are_left_alone(name, options):
    x = torch.cat(videos()).requires_grad_()
    copy, state = x.detach().clone(), torch.get_rng_state()
    plan = run(name, options, x, torch.tensor(GRIDS))
    assert torch.equal(x, copy) and torch.equal(torch.get_rng_state(), state)
    assert x.grad is None and not plan.weight.requires_grad


@each
def test_strided_features(name, options):
    x = torch.cat(videos())
    wide = torch.full((x.shape[0], 40), float("nan"))
    wide[:, :32] = x
    assert equal(run(name, options, wide[:, :32], GRIDS), run(name, options, x, GRIDS))
    assert equal(run(name, options, x.t().contiguous().t(), GRIDS), run(name, options, x, GRIDS))


@each
def test_empty(name, options):
    plan = run(name, options, torch.zeros(0, 32), []).validate()
    assert plan.num_sequences == 0 and plan.num_out == 0
    plan = run(name, options, torch.zeros(0, 32), [(0, 2, 2)]).validate()
    assert plan.num_sequences == 1 and plan.num_out == 0
    beside = run(name, options, make_video(0, (2, 3, 3)).float(), [(0, 2, 2), (2, 3, 3)]).validate()
    assert beside.lengths_in() == [0, 18]


@each
def test_gradients_pass_the_move(name, options):
    x = torch.cat(videos()).requires_grad_()
    plan = run(name, options, x, GRIDS)
    ops.plan_apply(plan, x).sum().backward()
    expected = torch.zeros(x.shape[0]).index_add_(0, plan.member.long(), plan.weight)
    torch.testing.assert_close(x.grad, expected.unsqueeze(1).expand_as(x))


class TestBadInput:
    @each
    def test_grid_that_does_not_match(self, name, options):
        with pytest.raises(ValueError, match=r"expected features of 18 tokens for grid_thw \[\(2, 3, 3\)\], got 17"):
            run(name, options, torch.zeros(17, 32), [(2, 3, 3)])

    @each
    def test_features(self, name, options):
        with pytest.raises(ValueError, match=r"expected features of shape \[N, C\], got \[2, 9, 32\]"):
            run(name, options, torch.zeros(2, 9, 32), [(2, 3, 3)])
        with pytest.raises(TypeError, match="expected features in float32"):
            run(name, options, torch.zeros(18, 32, dtype=torch.int64), [(2, 3, 3)])
        with pytest.raises(TypeError, match="expected features to be a tensor"):
            run(name, options, [[0.0]], [(1, 1, 1)])

    @pytest.mark.parametrize(
        "grid",
        [
            torch.tensor([2, 3, 3]),
            torch.tensor([[2.0, 3, 3]]),
            [(2, 3)],
            [(2, 3, 3.5)],
            [(2, -3, 3)],
            [(-1, 3, 3)],
            [3],
        ],
    )
    def test_grid(self, grid):
        with pytest.raises(ValueError, match="expected grid"):
            methods.uniform(torch.zeros(18, 4), grid, k=1)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match=r"expected a method among dtd, evs, .*, got 'fastv'"):
            methods.count("fastv", [(1, 2, 2)])


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 5)), max_size=3),
    st.sampled_from(CASES),
    st.integers(0, 5),
    st.booleans(),
)
def test_any_grids(grids, case, seed, exact):
    name, options = case
    n = sum(t * h * w for t, h, w in grids)
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    if exact:
        x = x.round()
    plan = run(name, options, x, grids).validate()
    counts = methods.count(name, grids, **options)
    assert counts is None or counts == plan.lengths_out()
    lengths = [t * h * w for t, h, w in grids]
    assert plan.lengths_in() == lengths
    assert all((out > 0) == (n > 0) and out <= n for n, out in zip(lengths, plan.lengths_out()))
