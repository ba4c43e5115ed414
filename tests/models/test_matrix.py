"""Every family of the zoo with flash attention and with a static cache, under each hook.

What the unreduced model cannot do itself is in ``UPSTREAM``, and each entry is seen to fail.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import pytest

from tests.models import flash, tiny
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
