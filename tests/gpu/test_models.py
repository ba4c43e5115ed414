"""Hugging Face models on a GPU: the real flash-attn where it is installed, and the stand-in for it."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.models import flash, tiny

HOOKS = {"visual": {"visual": "uniform:ratio=0.5"}, "uni": {"decoder": "uni_2_0.5"}}


def on(device, inputs):
    """Inputs of a bf16 model on a device."""
    return {k: v.to(device, torch.bfloat16 if v.is_floating_point() else None) for k, v in inputs.items()}


def logits(model, inputs, hook):
    """Logits of the first decoded token, cached and uncached, in a batch and alone."""
    rows = [tiny.row(inputs, tiny.ROWS, i) for i in range(3)]
    with vidtok.attach(model, **HOOKS[hook]), torch.no_grad():
        cached = tiny.generate(model, inputs, 1)[0][:, 0]
        uncached = model(**inputs, use_cache=False).logits[:, -1]
        alone = torch.cat([model(**row, use_cache=False).logits[:, -1] for row in rows])
    return torch.stack([cached, uncached, alone]).float()


@pytest.mark.parametrize("hook", list(HOOKS))
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_real_flash_attention(device, kind, hook):
    pytest.importorskip("flash_attn")
    inputs = on(device, tiny.batch(kind, tiny.ROWS))
    right = logits(tiny.make(kind, "sdpa").to(device, torch.bfloat16), inputs, hook)
    got = logits(tiny.make(kind, "flash_attention_2").to(device, torch.bfloat16), inputs, hook)
    like = torch.nn.functional.cosine_similarity(got, right[:1].expand_as(right), dim=-1)
    assert like.min() > 0.99


def test_the_stand_in_computes_what_the_kernels_do(device):
    package = pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    q, k, v = (torch.randn(17, h, 32, device=device, dtype=torch.bfloat16) for h in (4, 2, 2))
    cu_q = torch.tensor([0, 5, 6, 17], dtype=torch.int32, device=device)
    for options in ({"causal": True}, {"causal": True, "window_size": (3, 3)}, {"softcap": 5.0}):
        real = package.flash_attn_varlen_func(q, k, v, cu_q, cu_q, 11, 11, **options)
        ours = flash.flash_attn_varlen_func(q.cpu(), k.cpu(), v.cpu(), cu_q.cpu(), cu_q.cpu(), 11, 11, **options)
        torch.testing.assert_close(real.cpu(), ours, rtol=0, atol=3e-2)


@pytest.mark.parametrize("hook", list(HOOKS))
def test_offloaded_caches(device, hook):
    from transformers import DynamicCache

    model, inputs = tiny.make("qwen2_5_vl").to(device), tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    with vidtok.attach(model, **HOOKS[hook]):
        right, _ = tiny.generate(model, inputs)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True), offloading=True)
        torch.testing.assert_close(tiny.generate(model, inputs, past_key_values=cache)[0], right, rtol=0, atol=1e-4)
