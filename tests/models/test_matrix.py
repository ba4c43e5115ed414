"""Every family of the zoo with flash attention and with a static cache, under each hook.

What the unreduced model cannot do itself is in ``UPSTREAM``, and each entry is seen to fail.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch

from tests.models import flash, plain, tiny
from tests.models.test_named import KINDS as PLAIN
from tests.models.test_named import TEXT, prompt
from tests.models.test_zoo import NAMES, TAKEN, family, far, logits, uncached
from vidtok.models import attach

#: (family, "flash" or "static") -> why the unreduced model of transformers does not do it.
UPSTREAM = {
    ("dots3_note", "flash"): "transformers does not offer flash attention for it",
    ("glm5_next", "flash"): "transformers does not offer flash attention for it",
    ("qwen4_exp", "flash"): "transformers does not offer flash attention for it",
    ("minimax_m3_vl", "flash"): "transformers loads a kernel of its own from the hub for it",
    ("ernie4_5_vl_moe", "flash"): "its layers get position_ids of three rows, read as packed rows at batch 1",
    ("glm4v_moe", "flash"): "its layers get position_ids of three rows, read as packed rows at batch 1",
    ("gemma3", "flash"): "visual tokens see one another both ways, which flash attention cannot mask",
    ("gemma4", "flash"): "visual tokens see one another both ways, which flash attention cannot mask",
    ("gemma4_unified", "flash"): "visual tokens see one another both ways, which flash attention cannot mask",
    ("molmo2", "flash"): "visual tokens see one another both ways, which flash attention cannot mask",
}
HOOKS = ("visual", "uni", "attn")
SAME = 2e-5


@lru_cache(maxsize=2)
def made(name, attention="sdpa"):
    """Model of a family."""
    return family(name).make(attention)


@lru_cache(maxsize=2)
def fed(name, side="left"):
    """Ragged batch of a family."""
    return family(name).batch(family(name).ROWS, side=side)


def hooked(model, name, hook):
    """The attachment of a hook to a family's model."""
    if hook == "visual":
        return attach(model, visual="uniform:ratio=0.5")
    return attach(model, decoder=f"{hook}_{getattr(family(name), 'DROP_AT', 1)}_0.5")


@lru_cache(maxsize=6)
def expected(name, hook):
    """What sdpa and a growing cache generate: logits and tokens."""
    with hooked(made(name), name, hook) if hook else nullcontext():
        got, out = tiny.generate(made(name), fed(name), 3)
    return got, out.sequences[:, -3:]


@pytest.fixture
def flashing():
    """flash_attention_2 works."""
    with flash.installed() as calls:
        yield calls


@pytest.mark.parametrize("name", [n for n in NAMES if (n, "flash") in UPSTREAM])
def test_flash_fails_upstream(flashing, name):
    module, inputs = family(name), fed(name)
    one = module.row(inputs, module.ROWS, 0)
    try:
        got = logits(module.make("flash_attention_2"), one)
    except (ValueError, ImportError, AssertionError):
        return
    right = logits(made(name), one)
    assert far(got, right) > 1e-3 * right.abs().max()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", [n for n in TAKEN if (n, "flash") not in UPSTREAM])
class TestFlash:
    """flash_attention_2 equals sdpa."""

    def test_rows(self, flashing, name, hook):
        module = family(name)
        if hook in getattr(module, "REFUSED", {}):
            return
        inputs, model = fed(name), made(name, "flash_attention_2")
        right, tokens = expected(name, hook)
        scale = right.abs().max()
        if hook == "visual":
            plain, _ = tiny.generate(model, inputs, 1)
            assert far(plain, expected(name, "")[0][:, :1]) < SAME * scale
            assert far(plain, right[:, :1]) > 1e-4 * scale
        flashing.clear()
        with hooked(model, name, hook):
            got, _ = tiny.generate(model, inputs, 3)
            assert far(got, right) < SAME * scale
            assert ("varlen", 3, True) in flashing
            assert far(logits(model, fed(name, "right"))[range(3), -1], right[:, 0]) < SAME * scale
            for i in range(3):
                steps = 1 if hook == "attn" else 3
                one = module.row(inputs, module.ROWS, i)
                assert far(uncached(model, one, tokens[i : i + 1, :steps]), right[i : i + 1, :steps]) < SAME * scale


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", [n for n in TAKEN if (n, "static") not in UPSTREAM])
class TestStatic:
    """A static cache equals a growing one."""

    def test_rows(self, name, hook):
        module, model = family(name), made(name)
        if hook in getattr(module, "REFUSED", {}):
            return
        static = {"cache_implementation": "static", "disable_compile": True}
        right, _ = expected(name, hook)
        scale = right.abs().max()
        if hook == "visual":
            plain, _ = tiny.generate(model, fed(name), 2, **static)
            assert far(plain, expected(name, "")[0][:, :2]) < SAME * scale
        with hooked(model, name, hook):
            got, _ = tiny.generate(model, fed(name), 3, **static)
        assert far(got, right) < SAME * scale


@lru_cache(maxsize=2)
def language(kind, attention="sdpa"):
    """A plain language model."""
    return plain.make(kind, attention, **TEXT.get(kind, {}))


def turned(ids, mask, spans):
    """The rows with their padding at the right."""
    pads = (mask == 0).sum(1).tolist()
    rolled = [torch.stack([row.roll(-n) for row, n in zip(x, pads)]) for x in (ids, mask)]
    return *rolled, [(i, a - pads[i], b - pads[i]) for i, a, b in spans]


@lru_cache(maxsize=3)
def right_logits(kind, hook):
    """What each row alone gives with sdpa and no cache, and with a growing cache in the batch."""
    model, (ids, mask, spans) = language(kind), prompt()
    with plainly(model, kind, hook) as handle:
        with handle.tokens(spans, frames=8):
            got, _ = tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, 3)
        alone = []
        for i, first, last in spans:
            pad = int((mask[i] == 0).sum())
            with handle.tokens([(0, first - pad, last - pad)], frames=8):
                alone.append(logits(model, {"input_ids": ids[i : i + 1, pad:]})[0, -1])
    return got, torch.stack(alone)


def plainly(model, kind, hook):
    """The attachment of a hook to a plain language model."""
    if hook == "visual":
        return attach(model, visual="uniform:ratio=0.5")
    return attach(model, decoder=f"{hook}_{2 if kind == 'nemotron_h' else 1}_0.5")


@pytest.mark.parametrize("form", ["sdpa", "eager", "flash", "static"])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", PLAIN)
class TestPlain:
    """Language models whose visual tokens the caller names."""

    def test_rows(self, flashing, name, hook, form):
        ids, mask, spans = prompt()
        got, alone = right_logits(name, hook)
        scale = got.abs().max()
        attention = {"flash": "flash_attention_2", "static": "sdpa"}.get(form, form)
        static = {"cache_implementation": "static", "disable_compile": True} if form == "static" else {}
        model = language(name, attention)
        assert far(got[:, 0], alone) < SAME * scale
        assert far(logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1], got[:, 0]) > 1e-3 * scale
        with plainly(model, name, hook) as handle:
            with handle.tokens(spans, frames=8):
                assert far(tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, 3, **static)[0], got) < (
                    SAME * scale
                )
            ids, mask, spans = turned(ids, mask, spans)
            with handle.tokens(spans, frames=8):
                assert far(logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1], alone) < SAME * scale
            _, first, last = spans[1]
            with handle.tokens([(0, first, last)], frames=8):
                assert far(logits(model, {"input_ids": ids[1:2, : mask[1].sum()]})[0, -1], alone[1]) < SAME * scale
