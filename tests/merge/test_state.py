"""What stays in a model whose tokens merge, and what leaves it: copies, files, compiled code, failures, threads."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn

import vidtok
from tests.merge.own_vit import Own, tokens
from tests.merge.tempme_models import SMALL, clip, options, pixels, put, tower
from vidtok.merge import ToMe

SPECS = ["tome:r=3", SMALL + ",frame_pos=true"]


def answer(model, count: int = 4):
    with torch.no_grad():
        return model(pixels(count)).pooler_output


def grown(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(6))


# ------------------------------------------------------------------ batches, sizes, failures
@pytest.mark.parametrize("spec", SPECS)
def test_batch_and_image_sizes_may_change(spec):
    model = clip()
    alone = {}
    for size in (32, 48):
        with torch.no_grad(), vidtok.attach(model, vision=spec):
            alone[size] = model(grown(size), interpolate_pos_encoding=True).pooler_output
    with torch.no_grad(), vidtok.attach(model, vision=spec):
        eight = answer(model, 8)
        for size in (48, 32, 48):
            assert torch.equal(model(grown(size), interpolate_pos_encoding=True).pooler_output, alone[size])
        assert torch.equal(answer(model, 8), eight)


@pytest.mark.parametrize("spec", SPECS)
def test_a_failure_in_the_middle_leaves_nothing_behind(spec):
    model = clip()
    with vidtok.attach(model, vision=spec):
        want = answer(model)
        for layer in tower(model).encoder.layers:
            for part in (layer.layer_norm1, layer.self_attn.out_proj, layer.mlp):
                handle = part.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    answer(model, 8)
                handle.remove()
                assert torch.equal(answer(model), want)


@pytest.mark.parametrize("spec", SPECS)
def test_two_threads_with_a_model_each(spec):
    models = [clip(), clip()]
    handles = [vidtok.attach(model, vision=spec) for model in models]
    want = {count: models[0](pixels(count)).pooler_output.detach() for count in (4, 8)}
    wrong: list[object] = []

    def work(model, count):
        try:
            for _ in range(5):
                model.zero_grad()
                out = model(pixels(count)).pooler_output
                out.sum().backward()
                if not torch.equal(out, want[count]):
                    wrong.append(count)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, (4, 8), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.restore()
    assert not wrong


# ------------------------------------------------------------------ copies and files
@pytest.mark.parametrize("spec", SPECS)
def test_copies_and_files_know_nothing_of_it(spec, tmp_path):
    model = clip()
    want, keys = answer(model), list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    with vidtok.attach(model, vision=spec):
        merged = answer(model)
        assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model.save_pretrained(tmp_path)
        twin = copy.deepcopy(model)
        for other in (twin, torch.load(file, weights_only=False), type(model).from_pretrained(tmp_path)):
            assert torch.equal(answer(other.eval()), want)
            assert not [m for m in other.modules() if "_vidtok" in vars(m)]
            assert not hasattr(other, "_vidtok") and type(tower(other).encoder.layers[0]).__name__ == "CLIPEncoderLayer"
        with vidtok.attach(twin, vision=spec):
            assert torch.equal(answer(twin), merged)
        assert torch.equal(answer(model), merged)
    assert torch.equal(answer(model), want)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_load_while_tokens_merge(spec):
    model, other = clip(), clip()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    with vidtok.attach(other, vision=spec):
        want = answer(other)
    with vidtok.attach(model, vision=spec):
        assert not torch.equal(answer(model), want)
        assert not any(model.load_state_dict(other.state_dict()))
        assert torch.equal(answer(model), want)


def test_restore_in_any_order_and_again():
    model = clip()
    want, classes = answer(model), [type(m) for m in model.modules()]
    for spec in (SPECS * 2)[:3]:
        handle = vidtok.attach(model, vision=spec)
        assert not torch.equal(answer(model), want)
        handle.restore()
        handle.restore()
        assert torch.equal(answer(model), want) and [type(m) for m in model.modules()] == classes
        assert not [m for m in model.modules() if "_vidtok" in vars(m)]


def test_hooks_of_others_go_on():
    model, seen = clip(), []
    layer = tower(model).encoder.layers[1]
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out)))
    with vidtok.attach(model, vision="tome:r=3"):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        answer(model)
    assert [s if isinstance(s, torch.Size) else s[0] for s in seen] == [torch.Size([4, 14, 32])] * 2
    answer(model)
    assert len(seen) == 4


# ------------------------------------------------------------------ compiled code
class Pooled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).pooler_output


def step(function, model, count):
    model.zero_grad()
    function(pixels(count)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["tome:r=3", SMALL])
def test_a_compiled_training_step(spec):
    model = clip(3).train()
    plain = Pooled(model)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with vidtok.attach(model, vision=spec):
        for count in (4, 8):
            want = step(plain, model, count)
            for a, b in zip(step(compiled, model, count), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels(4)), plain(pixels(4)))


@pytest.mark.slow
def test_compiled_for_images_of_any_size():
    model = clip(5)
    plain = Sized(model)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=3"):
        for side in (32, 48, 64):
            torch.testing.assert_close(compiled(grown(side)), plain(grown(side)), rtol=1e-4, atol=1e-4)


class Sized(Pooled):
    def forward(self, x):
        return self.model(x, interpolate_pos_encoding=True).pooler_output


@pytest.mark.slow
def test_an_exported_tower():
    model = clip(3)
    with torch.no_grad(), vidtok.attach(model, vision="tome:r=3"):
        want = answer(model)
        program = torch.export.export(Pooled(model), (pixels(4),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels(4)), want)


# ------------------------------------------------------------------ other towers
@pytest.mark.parametrize("merge", [ToMe(r=3), options()])
def test_copies_of_a_tower_of_ones_own(merge):
    model = Own()
    want = model(tokens(4))
    with put(model, merge):
        assert torch.equal(copy.deepcopy(model)(tokens(4)), want)
        assert not torch.equal(model(tokens(4))[:, 0], want[:, 0])
    assert torch.equal(model(tokens(4)), want)
