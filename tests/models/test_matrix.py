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
from vidtok.models import attach, versions

_BOTH_WAYS = "visual tokens see one another both ways, which flash attention cannot mask"
_PACKED = "its layers get position_ids of three rows, read as packed rows at batch 1"
_NOT_OFFERED = "transformers does not offer flash attention for it"
_OWN_MASK = "its `_prepare_4d_causal_attention_mask_with_cache_position` does not take what generate() hands over"
_PIXTRAL = "`_is_packed_sequence` reads the patch positions of its vision tower as packed rows"

#: What the unreduced model of transformers does not do itself: (family, form) -> versions (None: all), why.
UPSTREAM: dict[tuple[str, str], tuple[tuple[str, ...] | None, str]] = {
    ("dots3_note", "flash"): (None, _NOT_OFFERED),
    ("glm5_next", "flash"): (None, _NOT_OFFERED),
    ("qwen4_exp", "flash"): (None, _NOT_OFFERED),
    ("minimax_m3_vl", "flash"): (None, "transformers loads a kernel of its own from the hub for it"),
    ("ernie4_5_vl_moe", "flash"): (None, _PACKED),
    ("glm4v_moe", "flash"): (None, _PACKED),
    ("gemma3", "flash"): (None, _BOTH_WAYS),
    ("gemma4", "flash"): (None, _BOTH_WAYS),
    ("gemma4_unified", "flash"): (None, _BOTH_WAYS),
    ("molmo2", "flash"): (None, _BOTH_WAYS),
    ("mistral3", "flash"): (("4.57.6", "5.17.0"), _PIXTRAL),
    ("qwen2_5_omni", "static"): (("4.57.6",), _OWN_MASK),
    ("qwen3_omni_moe", "static"): (("4.57.6",), _OWN_MASK),
}


def upstream(name: str, form: str, version: str = versions.installed()) -> str | None:
    """Why the unreduced model does not do it, None when it does."""
    which, reason = UPSTREAM.get((name, form), ((), ""))
    return reason if which is None or version in which else None


HOOKS = ("visual", "uni", "attn")
SAME = 2e-5


def one_length(hook):
    """Whether layers of a static cache share one length, so that drops between them are refused."""
    return hook != "visual" and tiny.VERSION[0] == 4


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


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize(("name", "form"), [(n, f) for n, f in UPSTREAM if n in NAMES and upstream(n, f)])
def test_the_unreduced_model_does_not(flashing, name, form):
    module = family(name)
    one = module.row(fed(name), module.ROWS, 0)
    try:
        if form == "static":
            got, _ = tiny.generate(made(name), one, 1, **STATIC)
        else:
            got = logits(module.make("flash_attention_2"), one)[:, -1:]
    except (ValueError, ImportError, AssertionError, IndexError, TypeError):
        made.cache_clear()
        return
    right = logits(made(name), one)[:, -1:]
    assert far(got, right) > 1e-3 * right.abs().max()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", [n for n in TAKEN if not upstream(n, "flash")])
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
@pytest.mark.parametrize("name", [n for n in TAKEN if not upstream(n, "static")])
class TestStatic:
    """A static cache equals a growing one."""

    def test_rows(self, name, hook):
        module, model = family(name), made(name)
        if hook in getattr(module, "REFUSED", {}):
            return
        right, _ = expected(name, hook)
        scale = right.abs().max()
        if hook == "visual":
            plain, _ = tiny.generate(model, fed(name), 2, **STATIC)
            assert far(plain, expected(name, "")[0][:, :2]) < SAME * scale
        with hooked(model, name, hook):
            if one_length(hook):
                with pytest.raises(ValueError, match="expected a cache that grows"):
                    tiny.generate(model, fed(name), 3, **STATIC)
                return
            got, _ = tiny.generate(model, fed(name), 3, **STATIC)
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
        static = STATIC if form == "static" else {}
        model = language(name, attention)
        assert far(got[:, 0], alone) < SAME * scale
        assert far(logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1], got[:, 0]) > 1e-3 * scale
        with plainly(model, name, hook) as handle:
            if static and one_length(hook):
                with handle.tokens(spans, frames=8), pytest.raises(ValueError, match="expected a cache that grows"):
                    tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, 3, **static)
                return
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
