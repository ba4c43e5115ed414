"""The compiled attention with a bias for each key, against softmax in fp64, on every instruction set of this CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import usable_isas
from tests.guard import guarded, poisoned_allocation
from vidtok.kernels.native.proportional_attention import proportional_attention

_C = pytest.importorskip("vidtok._C", reason="needs the compiled extension")

NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# One block of keys and several, an odd number of them, whole and partial vectors of channels, few rows and many.
SHAPES = [
    ((1, 2, 5, 16), 7),
    ((2, 3, 37, 64), 37),
    ((1, 2, 30, 80), 133),
    ((1, 1, 13, 64), 1100),
    ((2, 2, 25, 33), 64),
    ((1, 1, 1, 8), 1),
    ((1, 2, 50, 7), 600),
    ((1, 1, 7, 130), 513),
    ((3, 1, 200, 24), 65),
]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parts(dtype, shape=(2, 3, 37, 16), keys=None):
    """Queries, keys and values as towers have them, rows of all heads side by side, and sizes of the keys."""
    generator = torch.Generator().manual_seed(0)
    b, h, t, d = shape
    m = t if keys is None else keys
    q, k, v = (2 * torch.randn(b, n, h, d, generator=generator) for n in (t, m, m))
    size = torch.randint(1, 9, (b, m), generator=generator).float()
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)], size


def expected(qkv, size, scale):
    q, k, v = (x.double() for x in qkv)
    return torch.softmax(q @ k.transpose(-1, -2) * scale + size.double().log()[:, None, None], -1) @ v


def near(got, want, v):
    """An error that is small beside the values, a mean of which the output is."""
    return (got - want).abs().max() <= NEAR[v.dtype] * v.abs().max()


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(("shape", "keys"), SHAPES)
def test_it_is_softmax(isa, dtype, shape, keys):
    qkv, size = parts(dtype, shape, keys)
    got = proportional_attention(*qkv, size.log(), 0.25)
    want = expected(qkv, size, 0.25)
    assert got.dtype == dtype and got.shape == want.shape
    assert near(got, want, qkv[2])
    # What leaves goes into a projection as rows of all heads.
    assert got.transpose(1, 2).is_contiguous()
    if keys > 1:
        assert not near(got, expected(qkv, torch.ones_like(size), 0.25), qkv[2])


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 60),
    keys=st.integers(1, 150),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(list(NEAR)),
    isa=st.sampled_from(usable_isas()),
    count=st.sampled_from([1, 2]),
    bias=st.sampled_from(["none", "all", "one"]),
)
def test_any_shape(batch, heads, rows, keys, dim, dtype, isa, count, bias):
    qkv, size = parts(dtype, (batch, heads, rows, dim), keys)
    size = {"none": torch.ones_like(size), "all": size, "one": size[:1]}[bias]
    before = _C.build_info()["isa"]
    assert _C.force_isa(isa)
    try:
        with threads(count):
            got = proportional_attention(*qkv, None if bias == "none" else size.log(), dim**-0.5)
    finally:
        _C.force_isa(before)
    assert near(got, expected(qkv, size, dim**-0.5), qkv[2])


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("at", ["begin", "end"])
def test_no_access_outside_and_every_output_written(isa, dtype, at):
    for shape, keys in SHAPES:
        (q, k, v), size = parts(dtype, shape, keys)
        want = proportional_attention(q, k, v, size.log(), 0.25)
        held = [guarded(x.transpose(1, 2), at).transpose(1, 2) for x in (q, k, v)]
        with poisoned_allocation(at):
            got = proportional_attention(*held, guarded(size.log(), at), 0.25)
        assert near(got, want.double(), v)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (1, 2, 0, 3)])
def test_any_strides(order):
    """Slices of one projection, heads inside rows and rows inside heads."""
    generator = torch.Generator().manual_seed(1)
    back = tuple(order.index(i) for i in range(4))
    shape = [(2, 3, 21, 3 * 20)[i] for i in order]
    q, k, v = torch.randn(shape, generator=generator).permute(back).split(20, -1)
    size = torch.randint(1, 9, (2, 21), generator=generator).float()
    assert near(proportional_attention(q, k, v, size.log(), 0.3), expected((q, k, v), size, 0.3), v)
    # A batch of one that stands for many.
    shared = k[:1].expand(2, -1, -1, -1)
    assert near(proportional_attention(q, shared, v, size.log(), 0.3), expected((q, shared, v), size, 0.3), v)


def test_it_is_as_near_as_fused_attention():
    qkv, size = parts(torch.bfloat16, (2, 4, 150, 64))
    want = expected(qkv, size, 0.25)
    bias = size.log().to(torch.bfloat16)[:, None, None]

    def error(got):
        return float((got - want).square().mean().sqrt())

    fused = error(torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=0.25))
    assert error(proportional_attention(*qkv, bias[:, 0, 0].float(), 0.25)) < 1.2 * fused


def test_rows_are_the_same_whatever_stands_beside_them(isa):
    """Bits of a row do not depend on its place, on the other rows, or on the number of threads."""
    (q, k, v), size = parts(torch.float32, (1, 2, 230, 40), 90)
    with threads(1):
        whole = proportional_attention(q, k, v, size.log(), 0.2)
        for start, stop in ((0, 1), (3, 40), (101, 230)):
            part = proportional_attention(q[:, :, start:stop], k, v, size.log(), 0.2)
            assert torch.equal(part, whole[:, :, start:stop])
    with threads(2):
        assert torch.equal(proportional_attention(q, k, v, size.log(), 0.2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [37, 700])
def test_hidden_keys(isa, dtype, keys):
    """They count for nothing, in whatever block; where all are hidden there are zeros, as fused attention gives."""
    (q, k, v), size = parts(dtype, keys=keys)
    bias, seen = size.log(), keys // 3
    bias[0, seen:] = float("-inf")
    bias[1] = float("-inf")
    got = proportional_attention(q, k, v, bias, 0.25)
    assert near(got[:1], expected((q[:1], k[:1, :, :seen], v[:1, :, :seen]), size[:1, :seen], 0.25), v)
    assert not got[1].any()
    bias[0, :] = float("-inf")
    bias[0, -1] = 0.0
    got = proportional_attention(q, k, v, bias, 0.25)
    assert near(got[0], v[0, :, -1:].double().expand_as(got[0]), v)


def test_what_is_no_number_stays_in_its_row(isa):
    (q, k, v), size = parts(torch.float32)
    want = proportional_attention(q, k, v, size.log(), 0.25)
    q = q.clone()
    q[0, 1, 4, 2], q[1, 0, 3, 0] = float("nan"), float("inf")
    got = proportional_attention(q, k, v, size.log(), 0.25)
    for row in ((0, 1, 4), (1, 0, 3)):
        assert got[row].isnan().all()
        got[row] = want[row]
    assert torch.equal(got, want)


def test_nothing_to_attend():
    (q, k, v), size = parts(torch.float32)
    assert proportional_attention(q[:0], k[:0], v[:0], size[:0].log(), 0.25).shape == (0, 3, 37, 16)
    assert proportional_attention(q[:, :, :0], k, v, size.log(), 0.25).shape == (2, 3, 0, 16)
    assert not proportional_attention(q, k[:, :, :0], v[:, :, :0], size[:, :0].log(), 0.25).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype):
    """One key takes all the weight, in the first block or the last, and nothing overflows."""
    (q, k, v), size = parts(dtype, (1, 2, 9, 32), 1030)
    for place in (0, 1029):
        k = torch.zeros_like(k)
        k[:, :, place] = 60 * q[:, :, 0]
        got = proportional_attention(q, k, v, size.log(), 1.0)
        assert near(got[:, :, 0], v[:, :, place].double(), v)
