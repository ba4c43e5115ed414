"""The ways in which attention weighs keys by size, against softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidtok.kernels import select
from vidtok.kernels.native.proportional_attention import proportional_attention
from vidtok.merge import attention

SHAPE = (2, 3, 37, 16)
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
native = pytest.mark.skipif(not select.holds("proportional_attention"), reason="needs the compiled extension")


def parts(dtype, shape=SHAPE, keys=None):
    """Queries, keys and values as towers have them, rows of all heads side by side, and sizes of the keys."""
    generator = torch.Generator().manual_seed(0)
    b, h, t, d = shape
    m = t if keys is None else keys
    q, k, v = (2 * torch.randn(b, n, h, d, generator=generator) for n in (t, m, m))
    size = torch.randint(1, 9, (b, m), generator=generator).float()
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)], size


def expected(qkv, size, scale):
    q, k, v = (x.double() for x in qkv)
    weight = torch.softmax(q @ k.transpose(-1, -2) * scale + size.double().log()[:, None, None], -1)
    return weight @ v


def vectors(monkeypatch, there=True):
    """As if the extension had (no) vectors, and the processor no AMX."""
    monkeypatch.setattr(attention, "_vectors", lambda: there)
    monkeypatch.setattr(attention, "_amx", lambda: False)


@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", [False, True])
def test_forms_weigh_by_size(form, dtype, there, monkeypatch):
    vectors(monkeypatch, there)
    qkv, size = parts(dtype)
    want = expected(qkv, size, 0.2)
    got = attention.FORMS[form](attention.sdpa, *qkv, size, None, 0.2)
    assert got.dtype == dtype
    assert (got - want).abs().max() < NEAR[dtype]
    assert (got - expected(qkv, torch.ones_like(size), 0.2)).abs().max() > 0.2


@native
@pytest.mark.parametrize("dtype", list(NEAR))
# One block of keys and several, an odd number of them, whole and partial vectors of channels, few rows and many.
@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((1, 2, 5, 16), 7),
        ((2, 3, 37, 64), 37),
        ((1, 2, 30, 80), 133),
        ((1, 1, 13, 64), 1100),
        ((2, 2, 25, 33), 64),
        ((1, 1, 1, 8), 1),
        ((1, 2, 50, 7), 600),
        ((1, 1, 7, 130), 513),
        ((3, 1, 200, 24), 65),
    ],
)
def test_the_compiled_kernel_is_softmax(dtype, shape, keys):
    qkv, size = parts(dtype, shape, keys)
    want = expected(qkv, size, 0.25)
    got = proportional_attention(*qkv, size.log(), 0.25)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got - want).abs().max() <= {torch.float32: 1e-5}.get(dtype, 1e-2) * want.abs().max()
    # What leaves goes into a projection as rows of all heads.
    assert got.transpose(1, 2).is_contiguous()


@native
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 60),
    keys=st.integers(1, 150),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(list(NEAR)),
    threads=st.sampled_from([1, 2]),
    bias=st.sampled_from(["none", "all", "one"]),
)
def test_the_compiled_kernel_on_any_shape(batch, heads, rows, keys, dim, dtype, threads, bias):
    qkv, size = parts(dtype, (batch, heads, rows, dim), keys)
    size = {"none": torch.ones_like(size), "all": size, "one": size[:1]}[bias]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = proportional_attention(*qkv, None if bias == "none" else size.log(), dim**-0.5)
    finally:
        torch.set_num_threads(before)
    want = expected(qkv, size, dim**-0.5)
    assert (got - want).abs().max() <= {torch.float32: 1e-5}.get(dtype, 1e-2) * want.abs().max()


@native
def test_the_compiled_kernel_is_as_near_as_fused_attention():
    qkv, size = parts(torch.bfloat16, (2, 4, 150, 64))
    want = expected(qkv, size, 0.25)
    bias = size.log().to(torch.bfloat16)[:, None, None]

    def error(got):
        return float((got - want).square().mean().sqrt())

    fused = error(torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=bias, scale=0.25))
    assert error(proportional_attention(*qkv, bias[:, 0, 0].float(), 0.25)) < 1.2 * fused


@native
def test_rows_are_the_same_whatever_stands_beside_them():
    """Bits of a row do not depend on its place, on the other rows, or on the number of threads."""
    (q, k, v), size = parts(torch.float32, (1, 2, 230, 40), 90)
    whole = proportional_attention(q, k, v, size.log(), 0.2)
    for start, stop in ((0, 1), (3, 40), (101, 230)):
        assert torch.equal(proportional_attention(q[:, :, start:stop], k, v, size.log(), 0.2), whole[:, :, start:stop])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(proportional_attention(q, k, v, size.log(), 0.2), whole)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [37, 700])
def test_hidden_keys(dtype, keys):
    """They count for nothing, in whatever block; where all are hidden there are zeros, as fused attention gives."""
    (q, k, v), size = parts(dtype, keys=keys)
    bias = size.log()
    bias[0, keys // 3 :] = float("-inf")
    bias[1] = float("-inf")
    got = proportional_attention(q, k, v, bias, 0.25)
    seen = keys // 3
    want = expected((q[:1], k[:1, :, :seen], v[:1, :, :seen]), size[:1, :seen], 0.25)
    assert (got[:1] - want).abs().max() < NEAR[dtype]
    assert not got[1].any()
    bias[0, : keys // 2] = float("-inf")
    bias[0, -1] = 0.0
    got = proportional_attention(q, k, v, bias, 0.25)
    assert (got[0] - v[0, :, -1:]).abs().max() < NEAR[dtype]


@native
def test_what_is_no_number_stays_in_its_row():
    (q, k, v), size = parts(torch.float32)
    want = proportional_attention(q, k, v, size.log(), 0.25)
    q = q.clone()
    q[0, 1, 4, 2] = float("nan")
    q[1, 0, 3, 0] = float("inf")
    got = proportional_attention(q, k, v, size.log(), 0.25)
    assert got[0, 1, 4].isnan().all() and got[1, 0, 3].isnan().all()
    for row in ((0, 1, 4), (1, 0, 3)):
        got[row] = want[row]
    assert torch.equal(got, want)


@native
def test_nothing_to_attend():
    (q, k, v), size = parts(torch.float32)
    assert proportional_attention(q[:0], k[:0], v[:0], size[:0].log(), 0.25).shape == (0, 3, 37, 16)
    assert proportional_attention(q[:, :, :0], k, v, size.log(), 0.25).shape == (2, 3, 0, 16)
    assert not proportional_attention(q, k[:, :, :0], v[:, :, :0], size[:, :0].log(), 0.25).any()


@native
def test_what_the_compiled_kernel_serves(monkeypatch):
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.bfloat16)
    mask = size.log().to(q.dtype)[:, None, None]
    assert attention.serves(q, k, v, mask)
    assert attention.serves(q, k, v, None)
    assert attention.serves(q.float(), k.float(), v.float(), mask.float())
    assert not attention.serves(q, k, v, mask.expand(-1, -1, q.shape[2], -1))
    assert not attention.serves(q, k, v, mask > 0)
    assert not attention.serves(q, k[:, :1], v[:, :1], mask)
    assert not attention.serves(q.float(), k, v, mask)
    assert not attention.serves(q, k, v[..., :8], mask)
    assert not attention.serves(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), mask)
    assert not attention.serves(q.float()[:, :, :1], k.float(), v.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.serves(q, k, v, mask)
        assert not attention.serves(q.float(), k.float(), v.float(), mask)
    trained = q.clone().requires_grad_()
    assert not attention.serves(trained, k, v, mask)
    with torch.no_grad():
        assert attention.serves(trained, k, v, mask)
    attention.with_mask(attention.sdpa, trained, k, v, size, None, 0.25).sum().backward()
    assert trained.grad.abs().sum() > 0
    with select.use_backend("reference"):
        assert not attention.serves(q, k, v, mask)
    vectors(monkeypatch, False)
    assert not attention.serves(q, k, v, mask)


@native
def test_who_watches_sees_pytorchs_operators(monkeypatch):
    """A counter of operations, a function transform and forward gradients: all find what they would miss otherwise."""
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.float32)
    bias = size.log()[:, None, None]

    def attend(q):
        return attention.sdpa(q, k, v, bias, 0.25)

    want = attend(q)
    # The one form of PyTorch's that has forward gradients and is counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            attend(q)
        changed, tangent = torch.func.jvp(attend, (q,), (torch.ones_like(q),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            got = torch.autograd.forward_ad.unpack_dual(attend(dual)).tangent
        each = torch.func.vmap(lambda one: attention.sdpa(one[None], k[:1], v[:1], bias[:1], 0.25))(q[:1])
    assert counter.get_total_flops() == 4 * q.numel() * k.shape[2]
    assert (changed - want).abs().max() < 1e-5 and tangent.abs().max() > 0.1
    assert (got - tangent).abs().max() < 1e-4
    assert (each[0] - want[:1]).abs().max() < 1e-5


@native
def test_sdpa_takes_the_compiled_kernel(monkeypatch):
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.float32)
    want = attention.compiled(q, k, v, size.log()[:, None, None], 0.25)
    assert torch.equal(attention.with_mask(attention.sdpa, q, k, v, size, None, 0.25), want)
    hidden = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    hidden[:, :, :, 5:] = False
    got = attention.with_mask(attention.sdpa, q, k, v, size, hidden, 0.25)
    assert (got - expected((q, k[:, :, :5], v[:, :, :5]), size[:, :5], 0.25)).abs().max() < 1e-5
