"""Where counts follow from shapes, nothing on the device is read: the whole reduction can become a CUDA graph."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.reads import Read, mark, no_reads
from vidtok import methods, ops
from vidtok.plan import Plan

GRIDS = [(4, 6, 6), (4, 6, 6)]
COUNTED = [
    ("uniform", {"ratio": 0.25}),
    ("evs", {"ratio": 0.5}),
    ("tome", {"ratio": 0.5}),
    ("tome", {"k": 7}),
    ("pool", {"level": 2}),
]


def reduction(x, rows, position, columns, name, options, lengths):
    """What happens at the language model's input: decide, lift, move."""
    plan = getattr(methods, name)(x, GRIDS, **options)
    cu = mark(torch.tensor([0, 200, 400], dtype=torch.int32))
    lifted = plan.lift(columns, cu, dense=True, lengths=lengths)
    y = ops.plan_apply(lifted, rows)
    (ids,) = ops.position_remap(lifted, position)
    return y, ids


def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(288, 32, generator=generator)
    rows = torch.randn(2, 200, 32, generator=generator)
    position = torch.arange(200).expand(3, 2, 200).contiguous()
    columns = torch.cat([torch.arange(10, 154), torch.arange(210, 354)])
    return x, rows, position, columns


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "options"), COUNTED)
def test_a_reduction_of_known_counts_reads_nothing(name, options, backend):
    x, rows, position, columns = inputs()
    kept = getattr(methods, name)(x, GRIDS, **options).num_out // 2
    lengths = ([200, 200], [200 - 144 + kept] * 2)
    expected = reduction(x, rows, position, columns, name, options, None)
    given = [mark(t.clone()) for t in (x, rows, position, columns)]
    if backend == "reference":
        # The reference is plain torch that may ask: here it only shows that the guard would see it.
        with vidtok.use_backend("reference"), pytest.raises(Read), no_reads():
            ops.topk_select(given[0][:, 0].contiguous(), [3])
            given[0].sum().item()
        return
    with no_reads():
        got = reduction(*given, name, options, lengths)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "read", [lambda t: t.tolist(), lambda t: t.nonzero(), lambda t: bool(t.any()), lambda t: t[t > 0]]
)
def test_the_guard_sees_a_read(read):
    x = mark(torch.tensor([1, 0, 2]))
    with pytest.raises(Read), no_reads():
        read(x + 1)
    with no_reads():
        assert torch.tensor([3, 4]).tolist() == [3, 4]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_lengths_from_the_host_change_nothing(merge, dense):
    """Known lengths take another way through lift, to the same plan; unequal rows are padded."""
    if merge:
        owner = torch.tensor([0, 0, 1, 2, 3, 3])
        plan = Plan.from_assignment(owner, torch.tensor([0, 2, 3, 5]), torch.tensor([0, 6]), torch.tensor([0, 4]), 6)
    else:
        plan = Plan.gather(torch.tensor([0, 2, 3, 5]), torch.tensor([0, 6]), torch.tensor([0, 4]), 6)
    columns, cu = torch.tensor([1, 2, 3, 4, 8, 9]), torch.tensor([0, 7, 12], dtype=torch.int32)
    plain = plan.lift(columns, cu, dense=dense)
    known = plan.lift(columns, cu, dense=dense, lengths=([7, 5], [6, 4]))
    for name in ("cu_seqlens_in", "cu_seqlens_out", "anchor", "member", "offset", "weight"):
        assert torch.equal(getattr(plain, name), getattr(known, name)), name
    assert (plain.length_in, plain.length_out, plain.padded) == (known.length_in, known.length_out, known.padded)
    known.validate()


def test_lengths_that_do_not_fit_are_refused():
    plan = Plan.gather(torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([0, 1]), 2)
    columns, cu = torch.tensor([0, 1]), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected lengths that fall by 1 together, got \[4\] to \[2\]"):
        plan.lift(columns, cu, lengths=([4], [2]))
    with pytest.raises(ValueError, match="expected lengths of 1 rows without padding"):
        plan.lift(columns, cu, lengths=([4], [3]), real=torch.ones(4))
