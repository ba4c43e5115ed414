"""The Plan: algebra, invariants with negative controls, and passage through torch.compile and torch.export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidtok import Plan, ops


@st.composite
def plans(draw, lengths=None, gather=None, max_len=7):
    """A random plan: each sequence keeps some anchors; other tokens join an output, or none."""
    if lengths is None:
        lengths = draw(st.lists(st.integers(0, max_len), min_size=1, max_size=3))
    gather = draw(st.booleans()) if gather is None else gather
    parts = []
    for n in lengths:
        anchors = sorted(draw(st.sets(st.integers(0, n - 1)))) if n else []
        cu_in, cu_out = torch.tensor([0, n], dtype=torch.int32), torch.tensor([0, len(anchors)], dtype=torch.int32)
        if gather:
            parts.append(Plan.gather(torch.tensor(anchors, dtype=torch.int64), cu_in, cu_out, n))
            continue
        owner = torch.full((n,), -1, dtype=torch.int64)
        for i in range(n):
            if i in anchors:
                owner[i] = anchors.index(i)
            elif anchors:
                owner[i] = draw(st.integers(-1, len(anchors) - 1))
        parts.append(Plan.from_assignment(owner, torch.tensor(anchors, dtype=torch.int64), cu_in, cu_out, n))
    return Plan.cat(parts)


@st.composite
def chains(draw, steps=2):
    """Plans of which each takes what the one before gives."""
    chain = [draw(plans())]
    for _ in range(steps - 1):
        chain.append(draw(plans(lengths=chain[-1].lengths_out())))
    return chain


def matrix(plan: Plan) -> torch.Tensor:
    """The plan as a dense fp64 matrix [M, N]."""
    out = torch.zeros(plan.num_out, plan.num_in, dtype=torch.float64)
    offset, member, weight = plan.offset.tolist(), plan.member.tolist(), plan.weight.double()
    for m in range(plan.num_out):
        for j in range(offset[m], offset[m + 1]):
            out[m, member[j]] += weight[j]
    return out


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans are equal in every tensor."""
    names = ("cu_seqlens_in", "cu_seqlens_out", "anchor", "member", "offset", "weight")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.num_in == b.num_in


SMALL = Plan.from_assignment(
    torch.tensor([0, 0, 1, -1, 2, 2, 2]),
    torch.tensor([1, 2, 5]),
    torch.tensor([0, 4, 7], dtype=torch.int32),
    torch.tensor([0, 2, 3], dtype=torch.int32),
    7,
)


class TestContents:
    def test_from_assignment(self):
        assert SMALL.member.tolist() == [0, 1, 2, 4, 5, 6]
        assert SMALL.offset.tolist() == [0, 2, 3, 6]
        torch.testing.assert_close(SMALL.weight, torch.tensor([0.5, 0.5, 1, 1 / 3, 1 / 3, 1 / 3]))
        assert (SMALL.num_in, SMALL.num_out, SMALL.num_sequences) == (7, 3, 2)
        assert SMALL.lengths_in() == [4, 3] and SMALL.lengths_out() == [2, 1]
        SMALL.validate()

    def test_dtypes(self):
        for plan in (SMALL, Plan.identity([3, 2])):
            ints = (plan.cu_seqlens_in, plan.cu_seqlens_out, plan.anchor, plan.member, plan.offset)
            assert all(t.dtype == torch.int32 for t in ints)
            assert plan.weight.dtype == torch.float32

    def test_gather_derives_lists(self):
        plan = Plan.identity([3, 2])
        assert plan.is_gather and not SMALL.is_gather
        assert plan.member.tolist() == [0, 1, 2, 3, 4] and plan.offset.tolist() == [0, 1, 2, 3, 4, 5]
        assert plan.weight.tolist() == [1.0] * 5

    @pytest.mark.parametrize(("lengths", "common"), [([3, 3], 3), ([3, 2], None), ([], None), ([0], 0)])
    def test_identity_lengths(self, lengths, common):
        plan = Plan.identity(lengths).validate()
        assert plan.length_in == plan.length_out == common and plan.num_in == sum(lengths)

    def test_frozen(self):
        with pytest.raises(AttributeError):
            SMALL.num_in = 3


class TestAlgebra:
    @given(chains())
    def test_compose_is_the_product(self, chain):
        a, b = chain
        c = a.compose(b).validate()
        torch.testing.assert_close(matrix(c), matrix(b) @ matrix(a), rtol=0, atol=1e-6)
        assert c.anchor.tolist() == [a.anchor.tolist()[i] for i in b.anchor.tolist()]
        assert c.is_gather == (a.is_gather and b.is_gather)

    @given(chains(3))
    def test_compose_is_associative(self, chain):
        a, b, c = chain
        left, right = a.compose(b).compose(c), a.compose(b.compose(c))
        assert torch.equal(left.anchor, right.anchor) and torch.equal(left.member, right.member)
        torch.testing.assert_close(left.weight, right.weight)

    @given(plans())
    def test_identity_is_neutral(self, plan):
        assert same(Plan.identity(plan.lengths_in()).compose(plan), plan)
        assert same(plan.compose(Plan.identity(plan.lengths_out())), plan)

    def test_compose_with_padding(self):
        a = Plan.identity([4])
        cu = torch.tensor([0, 4], dtype=torch.int32)
        rows = torch.tensor([0, 2, 4], dtype=torch.int32)
        lifted = Plan.gather(torch.tensor([1, 3]), cu, torch.tensor([0, 2], dtype=torch.int32), 4)
        dense = replace(lifted, cu_seqlens_in=cu).lift(torch.arange(4), rows, dense=True)
        assert dense.lengths_out() == [1, 1] and not dense.padded
        padded = Plan.gather(torch.tensor([3]), cu, torch.tensor([0, 1], dtype=torch.int32), 4)
        padded = padded.lift(torch.arange(4), rows, dense=True)
        assert padded.anchor.tolist() == [-1, 3] and padded.padded
        whole = replace(a, cu_seqlens_in=rows, cu_seqlens_out=rows)
        assert whole.compose(padded).anchor.tolist() == [-1, 3]

    def test_compose_refuses_other_counts(self):
        with pytest.raises(ValueError, match="expected a plan over 3 tokens in 2 sequences, got one over 4"):
            SMALL.compose(Plan.identity([2, 2]))
        with pytest.raises(ValueError, match=r"expected input offsets \[0, 2, 3\], got \[0, 1, 3\]"):
            SMALL.compose(Plan.identity([1, 2]))

    @given(st.lists(plans(), min_size=1, max_size=3))
    def test_cat_is_block_diagonal(self, parts):
        plan = Plan.cat(parts).validate()
        torch.testing.assert_close(matrix(plan), torch.block_diag(*map(matrix, parts)), rtol=0, atol=0)
        assert plan.lengths_in() == [n for p in parts for n in p.lengths_in()]

    def test_cat_of_nothing(self):
        assert Plan.cat([]).num_sequences == 0

    def test_cat_common_length(self):
        assert Plan.cat([Plan.identity([3]), Plan.identity([3])]).length_out == 3
        assert Plan.cat([Plan.identity([3]), Plan.identity([2])]).length_out is None

    @given(plans(), st.randoms(use_true_random=False))
    def test_sorted_restores_the_order(self, plan, rng):
        order: list[int] = []
        for lo, hi in zip(plan.cu_seqlens_out.tolist(), plan.cu_seqlens_out.tolist()[1:]):
            part = list(range(lo, hi))
            rng.shuffle(part)
            order += part
        cu = plan.cu_seqlens_out
        mixed = plan.compose(Plan.gather(torch.tensor(order, dtype=torch.int64), cu, cu, plan.num_out))
        mixed.validate(ordered=False)
        restored = mixed.sorted().validate()
        assert torch.equal(restored.anchor, plan.anchor)
        torch.testing.assert_close(matrix(restored), matrix(plan), rtol=0, atol=0)

    def test_sorted_refuses_padding(self):
        with pytest.raises(ValueError, match="without left padding"):
            replace(SMALL, padded=True).sorted()

    @given(plans())
    def test_unmerge_copies_back(self, plan):
        y = torch.arange(1.0, plan.num_out + 1).unsqueeze(1).expand(-1, 2)
        back = plan.unmerge(y, fill=-1.0)
        owner = {i: m for m in range(plan.num_out) for i in plan.member[plan.offset[m] : plan.offset[m + 1]].tolist()}
        assert back[:, 0].tolist() == [owner.get(i, -2) + 1.0 for i in range(plan.num_in)]

    def test_unmerge_means_overlaps(self):
        cu = torch.tensor([0, 3], dtype=torch.int32)
        plan = Plan(
            cu,
            torch.tensor([0, 2], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([0, 1, 1, 2], dtype=torch.int32),
            torch.tensor([0, 2, 4], dtype=torch.int32),
            torch.full((4,), 0.5),
            3,
        ).validate()
        assert plan.unmerge(torch.tensor([[2.0], [4.0]])).tolist() == [[2.0], [3.0], [4.0]]

    def test_unmerge_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"expected y of shape \[3, C\], got \[4, 2\]"):
            SMALL.unmerge(torch.zeros(4, 2))

    def test_trace(self):
        plan = Plan.from_assignment(
            torch.tensor([0, -1, -1, 0, 1, 1, -1, 1]),
            torch.tensor([0, 5]),
            torch.tensor([0, 4, 8], dtype=torch.int32),
            torch.tensor([0, 1, 2], dtype=torch.int32),
            8,
        )
        grids = [(2, 1, 2), (1, 2, 2)]
        assert plan.trace(grids) == [[(0, 0, 0, 0), (0, 1, 0, 1)], [(1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 1)]]
        assert plan.trace(torch.tensor(grids)) == plan.trace(grids)
        with pytest.raises(ValueError, match="expected grids that hold 8 tokens together"):
            plan.trace([(1, 1, 7)])

    def test_to_keeps_values(self):
        assert same(SMALL.to("cpu"), SMALL)
        assert SMALL.to("meta").device.type == "meta"


@st.composite
def rows_and_plans(draw):
    """A plan over visual tokens, and the rows that hold them among text and padding."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    plan = draw(plans(lengths=lengths))
    kinds: list[str] = []
    cu = [0]
    for n in lengths:
        text = draw(st.integers(0, 3))
        row = draw(st.permutations("v" * n + "t" * text))
        kinds += ["p"] * draw(st.integers(0, 2)) + list(row)
        cu.append(len(kinds))
    return plan, kinds, torch.tensor(cu, dtype=torch.int32)


class TestLift:
    @given(rows_and_plans(), st.booleans())
    def test_text_is_kept_and_padding_left_out(self, case, dense):
        plan, kinds, cu = case
        columns = torch.tensor([i for i, kind in enumerate(kinds) if kind == "v"], dtype=torch.int64)
        real = torch.tensor([kind != "p" for kind in kinds], dtype=torch.bool)
        lifted = plan.lift(columns, cu, real=real, dense=dense).validate()
        kept = {int(columns[a]): matrix(plan)[m] for m, a in enumerate(plan.anchor.tolist())}
        expected = []
        for lo, hi in zip(cu.tolist(), cu.tolist()[1:]):
            expected.append([i for i in range(lo, hi) if kinds[i] == "t" or i in kept])
        if dense:
            width = max((len(row) for row in expected), default=0)
            assert lifted.length_out == width and lifted.lengths_out() == [width] * len(expected)
            expected = [[-1] * (width - len(row)) + row for row in expected]
        flat = [i for row in expected for i in row]
        assert lifted.anchor.tolist() == flat
        dense_matrix = matrix(lifted)
        for m, i in enumerate(flat):
            row = torch.zeros(len(kinds), dtype=torch.float64)
            if i >= 0 and kinds[i] == "t":
                row[i] = 1
            elif i >= 0:
                row[columns] = kept[i]
            torch.testing.assert_close(dense_matrix[m], row, rtol=0, atol=0)

    def test_common_length_from_the_host(self):
        lifted = Plan.identity([2]).lift(torch.arange(2), torch.tensor([0, 3]), dense=True, length=5)
        assert lifted.anchor.tolist() == [-1, -1, 0, 1, 2] and lifted.padded and lifted.length_out == 5

    def test_refuses_other_counts(self):
        with pytest.raises(ValueError, match=r"expected columns of shape \[7\]"):
            SMALL.lift(torch.arange(6), torch.tensor([0, 7]))
        with pytest.raises(ValueError, match="expected real of 7 entries"):
            SMALL.lift(torch.arange(7), torch.tensor([0, 7]), real=torch.ones(6))


BROKEN = {
    "cu_seqlens_in that start": {"cu_seqlens_in": torch.tensor([1, 4, 7], dtype=torch.int32)},
    "cu_seqlens_in .* end at 8": {"num_in": 8},
    "cu_seqlens_out .* never fall": {"cu_seqlens_out": torch.tensor([0, 4, 3], dtype=torch.int32)},
    "cu_seqlens_out for 2 sequences": {"cu_seqlens_out": torch.tensor([0, 3], dtype=torch.int32)},
    "length_in=4": {"length_in": 4},
    "length_out=2": {"length_out": 2},
    "offset": {"csr_offset": torch.tensor([0, 2, 3, 5], dtype=torch.int32)},
    "offset .*from 0": {"csr_offset": torch.tensor([1, 2, 3, 6], dtype=torch.int32)},
    "offset that never falls": {"csr_offset": torch.tensor([0, 4, 3, 6], dtype=torch.int32)},
    r"weight of shape \[6\]": {"csr_weight": torch.ones(5)},
    r"anchor\[2\] inside sequence 1": {"anchor": torch.tensor([1, 2, 3], dtype=torch.int32)},
    r"anchor\[0\] inside sequence 0": {"anchor": torch.tensor([-1, 2, 5], dtype=torch.int32)},
    "anchors that ascend in sequence 0": {"anchor": torch.tensor([2, 1, 5], dtype=torch.int32)},
    "anchors that ascend .*got 1 before 1": {"anchor": torch.tensor([1, 1, 5], dtype=torch.int32)},
    "members for output 1, got none": {
        "csr_offset": torch.tensor([0, 3, 3, 6], dtype=torch.int32),
        "csr_weight": torch.full((6,), 1 / 3),
    },
    "members of output 2 inside sequence 1": {"csr_member": torch.tensor([0, 1, 2, 4, 5, 3], dtype=torch.int32)},
    "members of output 0 inside sequence 0": {"csr_member": torch.tensor([0, -1, 2, 4, 5, 6], dtype=torch.int32)},
    "weights of output 0 that sum to 1": {"csr_weight": torch.tensor([0.5, 0.6, 1, 0.25, 0.25, 0.5])},
    "weights of output 2 that sum to 1, got nan": {"csr_weight": torch.tensor([0.5, 0.5, 1, 0.25, 0.25, float("nan")])},
}


class TestValidate:
    @pytest.mark.parametrize("message", BROKEN)
    def test_names_what_is_broken(self, message):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **BROKEN[message]).validate()

    def test_order_can_be_waived(self):
        replace(SMALL, anchor=torch.tensor([2, 1, 5], dtype=torch.int32)).validate(ordered=False)

    def test_padding_only_on_the_left(self):
        plan = replace(Plan.identity([3]), anchor=torch.tensor([-1, 0, 1], dtype=torch.int32), padded=True).validate()
        with pytest.raises(ValueError, match="anchor"):
            replace(plan, anchor=torch.tensor([0, -1, 1], dtype=torch.int32)).validate()


class TestTracing:
    def test_compiles_whole(self):
        torch._dynamo.reset()

        def move(plan, x):
            return ops.plan_apply(plan, x) * plan.weight[plan.offset[:-1].long()].unsqueeze(1), plan

        x = torch.randn(7, 3)
        got, plan = torch.compile(move, fullgraph=True, backend="aot_eager")(SMALL, x)
        assert torch.equal(got, move(SMALL, x)[0]) and same(plan, SMALL)

    def test_gathers_compose_under_compile(self):
        torch._dynamo.reset()
        a = Plan.identity([4])
        cu = torch.tensor([0, 4], dtype=torch.int32)
        b = Plan.gather(torch.tensor([0, 3]), cu, torch.tensor([0, 2], dtype=torch.int32), 4, length_in=4, length_out=2)

        def move(a, b, x):
            return ops.plan_apply(a.compose(b), x)

        x = torch.randn(4, 3)
        assert torch.equal(torch.compile(move, fullgraph=True, backend="aot_eager")(a, b, x), x[[0, 3]])

    def test_other_sizes_do_not_need_another_graph(self):
        torch._dynamo.reset()
        move = torch.compile(lambda p, x: ops.plan_apply(p, x), fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (5, 6, 9):
            plan = Plan.identity([n])
            x = torch.randn(n, 2)
            assert torch.equal(move(plan, x), x)

    @pytest.mark.parametrize("plan", [SMALL, Plan.identity([4, 3])], ids=["merge", "gather"])
    def test_exports(self, plan):
        class Move(torch.nn.Module):
            def forward(self, plan, x):
                return ops.plan_apply(plan, x), plan

        x = torch.randn(7, 3)
        exported = torch.export.export(Move(), (plan, x))
        y, out = exported.module()(plan, x)
        assert torch.equal(y, ops.plan_apply(plan, x)) and same(out, plan)
