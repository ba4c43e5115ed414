"""The ways in which attention weighs keys by size, against softmax in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidtok.kernels import select
from vidtok.merge import attention

SHAPE = (2, 3, 37, 16)
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.05}
native = pytest.mark.skipif(not select.holds("proportional_attention"), reason="needs the compiled extension")


def parts(dtype):
    generator = torch.Generator().manual_seed(0)
    b, h, t, d = SHAPE
    q, k, v = (2 * torch.randn(b, t, h, d, generator=generator) for _ in range(3))
    size = torch.randint(1, 9, (b, t), generator=generator).float()
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
    with torch.no_grad():
        got = attention.FORMS[form](attention.sdpa, *qkv, size, None, 0.2)
    assert got.dtype == dtype
    assert (got - want).abs().max() < NEAR[dtype]
    assert (got - expected(qkv, torch.ones_like(size), 0.2)).abs().max() > 0.2


@native
def test_what_the_compiled_kernel_serves(monkeypatch):
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.bfloat16)
    mask = size.log().to(q.dtype)[:, None, None]
    assert not attention.serves(q, k, v, mask)
    with torch.inference_mode():
        assert attention.serves(q, k, v, mask)
    with torch.no_grad():
        assert attention.serves(q, k, v, mask)
        assert attention.serves(q, k, v, None)
        assert attention.serves(q, k, v, mask.float())
        assert attention.serves(q.float(), k.float(), v.float(), mask.float())
        assert not attention.serves(q, k, v, mask.expand(-1, -1, q.shape[2], -1))
        assert not attention.serves(q, k, v, mask > 0)
        assert not attention.serves(q, k, v, mask.double())
        assert not attention.serves(q, k, v, mask.to("meta"))
        assert not attention.serves(q, k.to("meta"), v.to("meta"), mask)
        assert not attention.serves(q, k[:, :1], v[:, :1], mask)
        assert not attention.serves(q.float(), k, v, mask)
        assert not attention.serves(q, k, v[..., :8], mask)
        assert not attention.serves(q, k, v.transpose(2, 3).contiguous().transpose(2, 3), mask)
        assert not attention.serves(q.float()[:, :, :1], k.float(), v.float(), mask)
        assert not attention.serves(torch._neg_view(q), k, v, mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert attention.serves(q, k, v, mask)
            assert not attention.serves(q.float(), k.float(), v.float(), mask)
        with sdpa_kernel(SDPBackend.MATH):
            assert not attention.serves(q, k, v, mask)
        with select.use_backend("reference"):
            assert not attention.serves(q, k, v, mask)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: None)
        assert not attention.serves(q, k, v, mask)
        monkeypatch.undo()
        vectors(monkeypatch, False)
        assert not attention.serves(q, k, v, mask)
    trained = q.clone().requires_grad_()
    attention.with_mask(attention.sdpa, trained, k, v, size, None, 0.25).sum().backward()
    assert trained.grad.abs().sum() > 0


@native
def test_who_watches_sees_pytorchs_operators(monkeypatch):
    """Counters of operations, tracers, function transforms, forward gradients: they find what they would miss."""
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.float32)
    bias = size.log()[:, None, None]

    def attend(q):
        return attention.sdpa(q, k, v, bias, 0.25)

    with torch.no_grad():
        want = attend(q)
        traced = torch.jit.trace(attend, q, check_trace=False)
        assert (traced(q) - want).abs().max() < 1e-5
        assert (traced(-q) - attend(-q)).abs().max() < 1e-5
    # The one form of PyTorch's that has forward gradients and is counted on a CPU, though it alone would be enough to
    # keep the kernel from serving.
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: True)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            attend(q)
        changed, tangent = torch.func.jvp(attend, (q,), (torch.ones_like(q),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            got = torch.autograd.forward_ad.unpack_dual(attend(dual)).tangent
        each = torch.func.vmap(lambda one: attention.sdpa(one[None], k[:1], v[:1], bias[:1], 0.25))(q[:1])
    assert counter.get_total_flops() == 4 * q.numel() * k.shape[2]
    assert (changed - want).abs().max() < 1e-5 and tangent.abs().max() > 0.1
    assert got is not None and (got - tangent).abs().max() < 1e-4
    assert (each[0] - want[:1]).abs().max() < 1e-5


@native
def test_sdpa_takes_the_compiled_kernel(monkeypatch):
    vectors(monkeypatch)
    (q, k, v), size = parts(torch.float32)
    with torch.no_grad():
        want = attention.compiled(q, k, v, size.log()[:, None, None], 0.25)
        assert torch.equal(attention.with_mask(attention.sdpa, q, k, v, size, None, 0.25), want)
        hidden = torch.ones(2, 1, 1, 37, dtype=torch.bool)
        hidden[:, :, :, 5:] = False
        got = attention.with_mask(attention.sdpa, q, k, v, size, hidden, 0.25)
    assert (got - expected((q, k[:, :, :5], v[:, :, :5]), size[:, :5], 0.25)).abs().max() < 1e-5
