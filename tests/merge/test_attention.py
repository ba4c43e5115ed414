"""The ways in which attention weighs keys by size, against softmax in fp64."""

from __future__ import annotations

import pytest
import torch

from vidtok.merge import attention

SHAPE = (2, 3, 37, 16)


def parts(dtype):
    generator = torch.Generator().manual_seed(0)
    b, h, t, d = SHAPE
    q, k, v = (2 * torch.randn(b, t, h, d, generator=generator) for _ in range(3))
    size = torch.randint(1, 9, (b, t), generator=generator).float()
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)], size


def expected(qkv, size, scale):
    q, k, v = (x.double() for x in qkv)
    weight = (q @ k.transpose(-1, -2) * scale).exp() * size.double()[:, None, None]
    return (weight / weight.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("form", ["mask", "channel"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("slow", [False, True])
def test_forms_weigh_by_size(form, dtype, near, slow, monkeypatch):
    monkeypatch.setattr(attention, "_slow_bf16", lambda: slow)
    monkeypatch.setattr(attention, "_SCORES", 2 * 37 * 37)  # two heads, then the third
    qkv, size = parts(dtype)
    want = expected(qkv, size, 0.2)
    got = attention.FORMS[form](attention.sdpa, *qkv, size, None, 0.2)
    assert got.dtype == dtype
    assert (got - want).abs().max() < near
    assert (got - expected(qkv, torch.ones_like(size), 0.2)).abs().max() > 0.2


def test_products_are_as_near_as_fused_attention(monkeypatch):
    qkv, size = parts(torch.bfloat16)
    want = expected(qkv, size, 0.25)
    used = []
    products = attention.products
    monkeypatch.setattr(attention, "products", lambda *args: used.append(1) or products(*args))

    def error(slow):
        monkeypatch.setattr(attention, "_slow_bf16", lambda: slow)
        got = attention.with_mask(attention.sdpa, *qkv, size, None, 0.25)
        return float((got - want).square().mean().sqrt())

    fused = error(False)
    assert not used
    assert error(True) < 1.5 * fused
    assert used


def test_products_of_a_row_without_keys():
    """Padding that fills a row: zeros, as fused attention gives, and the other rows as they are."""
    (q, k, v), size = parts(torch.bfloat16)
    mask = size.log().to(q.dtype)[:, None, None].clone()
    want = attention.products(q, k, v, mask, 0.25)
    mask[1] = float("-inf")
    got = attention.products(q, k, v, mask, 0.25)
    assert torch.equal(got[0], want[0]) and not got[1].any()
    assert not torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25)[1].any()


def test_products_serve_bf16_without_gradients(monkeypatch):
    monkeypatch.setattr(attention, "_slow_bf16", lambda: True)
    (q, k, v), size = parts(torch.bfloat16)
    mask = size.log().to(q.dtype)[:, None, None]
    assert attention.in_products(q, k, v, mask)
    assert not attention.in_products(q.float(), k.float(), v.float(), mask.float())
    assert not attention.in_products(q, k, v, mask.expand(-1, -1, q.shape[2], -1))
    assert not attention.in_products(q, k[:, :1], v[:, :1], mask)
    trained = q.clone().requires_grad_()
    assert not attention.in_products(trained, k, v, mask)
    with torch.no_grad():
        assert attention.in_products(trained, k, v, mask)
    attention.with_mask(attention.sdpa, trained, k, v, size, None, 0.25).sum().backward()
    assert trained.grad.abs().sum() > 0
