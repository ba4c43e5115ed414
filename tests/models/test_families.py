"""Which models are taken, through which wrappers, and which are refused."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import vidtok
from tests.models import tiny
from vidtok.models import families


def test_unknown_classes_are_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)
    for model in (nn.Linear(2, 2), GPT2LMHeadModel(small), "Qwen/Qwen2.5-VL"):
        with pytest.raises(ValueError, match=r"Qwen2_5_VLForConditionalGeneration.*got \w+") as error:
            vidtok.attach(model, visual=tiny.drop)
        assert "\n" not in str(error.value)


def test_subclasses_and_base_models(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with vidtok.attach(model, visual=tiny.drop):
        right = model.model(**inputs, use_cache=False)[0]
    with vidtok.attach(model.model, visual=tiny.drop):
        assert torch.equal(model.model(**inputs, use_cache=False)[0], right)
        cached, _ = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
        torch.testing.assert_close(cached, uncached, rtol=0, atol=2e-5)
    before = type(model)
    try:
        model.__class__ = type("Mine", (before,), {})
        vidtok.attach(model, visual=tiny.drop).restore()
    finally:
        model.__class__ = before


class Adapter(nn.Module):
    """The part of a PEFT model that matters here."""

    def __init__(self, model, prompt=False):
        super().__init__()
        self.base_model = model
        self.peft_config = {"default": type("Config", (), {"is_prompt_learning": prompt})()}

    def get_base_model(self):
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def test_adapters(models):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    with vidtok.attach(model, visual=tiny.drop):
        right = model(**inputs).logits
    wrapped = Adapter(model)
    with vidtok.attach(wrapped, visual=tiny.drop):
        assert torch.equal(wrapped(**inputs).logits, right)
    with pytest.raises(ValueError, match="prompt"):
        vidtok.attach(Adapter(model, prompt=True), visual=tiny.drop)
    with pytest.raises(ValueError, match="DataParallel"):
        vidtok.attach(nn.DataParallel(model), visual=tiny.drop)


def test_real_peft_when_it_is_installed():
    peft = pytest.importorskip("peft")
    model, inputs = tiny.make("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs["labels"] = inputs["input_ids"].clone()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    keys = list(wrapped.state_dict())
    with vidtok.attach(wrapped, visual=tiny.drop):
        out = wrapped(**inputs, use_cache=False)
        out.loss.backward()
        assert out.logits.shape[1] < inputs["input_ids"].shape[1]
        assert list(wrapped.state_dict()) == keys


@pytest.fixture
def one_process():
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model, inputs):
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    return out.loss.detach()


def test_distributed_wrappers(one_process):
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    plain = tiny.make("qwen2_5_vl")
    with vidtok.attach(plain, visual=tiny.drop):
        right = trained(plain, inputs)
    for wrap_first in (True, False):
        inner = tiny.make("qwen2_5_vl")
        if wrap_first:
            model = nn.parallel.DistributedDataParallel(inner)
            handle = vidtok.attach(model, visual=tiny.drop)
        else:
            handle = vidtok.attach(inner, visual=tiny.drop)
            model = nn.parallel.DistributedDataParallel(inner)
        torch.testing.assert_close(trained(model, inputs), right)
        handle.restore()


def test_fully_sharded(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = tiny.batch("qwen3_vl", tiny.ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    plain = tiny.make("qwen3_vl")
    with vidtok.attach(plain, visual=tiny.drop):
        right = trained(plain, inputs)
    mesh = init_device_mesh("cpu", (1,))
    model = tiny.make("qwen3_vl")
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with vidtok.attach(model, visual=tiny.drop):
        torch.testing.assert_close(trained(model, inputs), right)


def test_models_spread_by_accelerate(models):
    accelerate = pytest.importorskip("accelerate")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    with vidtok.attach(models("qwen2_5_vl"), visual=tiny.drop):
        right = models("qwen2_5_vl")(**inputs, use_cache=False).loss
        logits, _ = tiny.generate(models("qwen2_5_vl"), inputs)
    model = accelerate.cpu_offload(tiny.make("qwen2_5_vl"), execution_device=torch.device("cpu"))
    with vidtok.attach(model, visual=tiny.drop):
        torch.testing.assert_close(model(**inputs, use_cache=False).loss, right)
        torch.testing.assert_close(tiny.generate(model, inputs)[0], logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models():
    inputs, model = tiny.batch("qwen2_5_vl", tiny.ROWS), tiny.make("qwen2_5_vl", layers=1)
    plain = model(**inputs, use_cache=False).logits
    with vidtok.attach(model, visual=tiny.drop):
        right = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    # Compiled code does not look for new hooks, so code from before and after must not be kept.
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, plain)
    with vidtok.attach(model, visual=tiny.drop):
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, right)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, plain)
    torch.compiler.reset()


def test_compiled_models_without_breaks_are_refused(models):
    with pytest.raises(ValueError, match="fullgraph"):
        vidtok.attach(torch.compile(models("qwen2_5_vl"), fullgraph=True, backend="eager"), visual=tiny.drop)


@pytest.mark.filterwarnings("ignore")
def test_quantised_models():
    model = tiny.make("qwen2_5_vl")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with vidtok.attach(quantised, visual=tiny.drop):
        cached, _ = tiny.generate(quantised, inputs, steps=2)
    assert torch.isfinite(cached).all()


def test_refusals_are_listed():
    assert {row[0].split()[0] for row in families.REFUSED} >= {"prefill_chunk_size", "packed", "nn.DataParallel"}
    assert all(len(row) == 3 for row in families.REFUSED)
