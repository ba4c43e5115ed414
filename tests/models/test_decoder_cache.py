"""Caches whose layers differ in length behind drops inside the decoder, and turns that continue them."""

from __future__ import annotations

import copy

import pytest
import torch

import vidtok
from tests.models import plain, tiny

CLOSE = {"rtol": 0, "atol": 2e-5}
GIVEN = plain.GIVEN


@pytest.fixture
def language():
    """Plain models by kind and attention."""
    return plain.get


@pytest.fixture(autouse=True)
def no_grad():
    """Nothing here trains."""
    with torch.no_grad():
        yield


@pytest.mark.skipif(tiny.VERSION[0] < 5, reason="refused there")
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
@pytest.mark.parametrize("spec", ["uni_0_0.5", "uni_1_0.5-attn_3_0.25"])
def test_static_cache(language, kind, spec):
    from transformers import StaticCache

    model = language(kind)
    with vidtok.attach(model, decoder=spec) as handle:
        cache = StaticCache(config=model.config, max_cache_len=64)
        got, more, _ = plain.answer(model, handle, GIVEN, past_key_values=cache)
        for i, row in enumerate(GIVEN):
            torch.testing.assert_close(got[i], plain.reference(model, handle, row, more[i].tolist()), **CLOSE)


@pytest.mark.skipif(tiny.VERSION[0] > 4, reason="layers count for themselves there")
def test_static_cache_is_refused(language):
    from transformers import StaticCache

    model = language("qwen2")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="expected a cache that grows, got a static one"):
            plain.answer(model, handle, GIVEN, past_key_values=cache)


def continued(model, cache, ids, mask):
    """Logits of more tokens on a filled cache."""
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    number = {name: value[:, -ids.shape[1] :] for name, value in plain.positions(model, mask).items()}
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, **number).logits


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_crop_reorder_repeat_and_copy(language, kind):
    model = language(kind)
    inputs = plain.batch(GIVEN)
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with vidtok.attach(model, decoder="uni_0_0.7-uni_2_0.25") as handle:
        _, _, cache = plain.answer(model, handle, GIVEN, 0)
        want = continued(model, copy.deepcopy(cache), more, inputs["attention_mask"])
        cropped = copy.deepcopy(cache)
        continued(model, cropped, torch.full((3, 4), 77), inputs["attention_mask"])
        cropped.crop(max(map(len, GIVEN)))
        torch.testing.assert_close(continued(model, cropped, more, inputs["attention_mask"]), want, **CLOSE)
        with pytest.raises(ValueError, match="expected to keep at least"):
            copy.deepcopy(cache).crop(10)
        order = torch.tensor([2, 0, 1])
        turned = copy.deepcopy(cache)
        turned.reorder_cache(order)
        got = continued(model, turned, more[order], inputs["attention_mask"][order])
        torch.testing.assert_close(got, want[order], **CLOSE)
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(2)
        mask = inputs["attention_mask"].repeat_interleave(2, 0)
        got = continued(model, wide, more.repeat_interleave(2, 0), mask)
        torch.testing.assert_close(got, want.repeat_interleave(2, 0), **CLOSE)
        narrow = copy.deepcopy(cache)
        narrow.batch_select_indices(order[:2])
        got = continued(model, narrow, more[order[:2]], inputs["attention_mask"][order[:2]])
        torch.testing.assert_close(got, want[order[:2]], **CLOSE)


def test_cache_of_other_drops_is_refused(language):
    model = language("qwen2")
    inputs = plain.batch(GIVEN)
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        _, _, cache = plain.answer(model, handle, GIVEN, 0)
    ids = torch.tensor([[7], [8], [9]])
    with pytest.raises(ValueError, match="whose attachment was removed"):
        continued(model, cache, ids, inputs["attention_mask"])
    with vidtok.attach(model, decoder="uni_2_0.5"), pytest.raises(ValueError, match="expected a cache"):
        continued(model, cache, ids, inputs["attention_mask"])


def test_right_padding_with_a_cache(language):
    """Layers before a drop keep the layout that they were given, those behind it are padded at the left."""
    model = language("qwen2")
    inputs = plain.batch(GIVEN, "right")
    mask = inputs["attention_mask"]
    more = torch.tensor([[7, 8], [9, 10], [11, 12]])
    with vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25") as handle:
        with handle.tokens(plain.visual(inputs["input_ids"])):
            out = model(**inputs, **plain.positions(model, mask), use_cache=True)
        logits = [out.logits[:, -1]]
        for i in range(2):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            number = mask.sum(1, keepdim=True) - 1
            given = {"input_ids": more[:, i : i + 1], "attention_mask": mask, "position_ids": number}
            logits.append(model(**given, past_key_values=out.past_key_values).logits[:, -1])
        for i, row in enumerate(GIVEN):
            alone = plain.reference(model, handle, row, more[i].tolist())
            torch.testing.assert_close(torch.stack(logits, 1)[i], alone, **CLOSE)


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
def test_second_turn_with_text_and_with_a_video(language, kind, position):
    """Both turns in one pass keep the same tokens: a video has a budget of its own."""
    model = language(kind)
    turns = [plain.rows([[16]], seed)[0] for seed in (3, 4)]
    text = [9, 60, 33]
    whole = torch.tensor([turns[0] + text + turns[1]])
    attached = vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25", position=position)
    with attached as handle, handle.tokens(plain.visual(whole)):
        want = model(input_ids=whole, use_cache=False).logits[0]
        cache = None
        for part in (turns[0], text, turns[1]):
            out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[0, -3:], want[-3:], **CLOSE)
    assert int(cache.get_seq_length()) == whole.shape[1]


@pytest.mark.skipif(tiny.VERSION < (5, 17), reason="no such model there")
def test_recurrent_layers_go_on_in_a_second_turn(language):
    model = language("nemotron_h")
    parts = [plain.rows([[16]], 3)[0], [9, 60, 33], plain.rows([[16]], 4)[0]]
    whole = torch.tensor([[token for part in parts for token in part]])
    attached = vidtok.attach(model, decoder="uni_1_0.5-uni_3_0.25")
    with attached as handle, handle.tokens(plain.visual(whole)):
        want = model(input_ids=whole, use_cache=False).logits[0]
        cache = None
        for part in parts:
            out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    torch.testing.assert_close(out.logits[0, -3:], want[-3:], **CLOSE)


def turns(model, handle, parts):
    """Logits of the last column after several ragged turns with a cache."""
    cache, masks = None, []
    for rows in parts:
        inputs = plain.batch(rows)
        width = inputs["input_ids"].shape[1]
        masks.append(inputs["attention_mask"])
        mask = torch.cat(masks, 1)
        number = {name: value[:, -width:] for name, value in plain.positions(model, mask).items()}
        where = torch.nn.functional.pad(plain.visual(inputs["input_ids"]), (mask.shape[1] - width, 0))
        with handle.tokens(where):
            out = model(
                input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True, **number
            )
        cache = out.past_key_values
    return out.logits[:, -1]


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("spec", ["uni_1_0.5-uni_3_0.25", "uni_0_0.5"])
def test_ragged_turns(language, spec, position):
    """Text, videos, text and videos again; padding lies in the middle of the rows."""
    model = language("qwen2")
    parts = [plain.rows([[], [], []]), GIVEN, plain.rows([[], [], []], 9), plain.rows([[9], [8], [20]], 11)]
    with vidtok.attach(model, decoder=spec, position=position) as handle:
        got = turns(model, handle, parts)
        for i in range(3):
            torch.testing.assert_close(got[i : i + 1], turns(model, handle, [[p[i]] for p in parts]), **CLOSE)


def test_windows_over_new_padding_are_refused(language):
    """A later turn in which one row loses more than another, though both came equally long."""
    model = language("mistral")
    first = [[7, 8, 9, 10], [11, 12, 13, 14]]
    even = [[20, *range(200, 208), 30, 31], [21, *range(208, 216), 32, 33]]
    uneven = [even[0], [21, 22, 23, 24, 25, *range(208, 212), 32, 33]]
    with vidtok.attach(model, decoder="uni_1_0.5") as handle:
        turns(model, handle, [first, even])
        with pytest.raises(ValueError, match="expected a later turn whose rows lose as many tokens each"):
            turns(model, handle, [first, uneven])
        turns(model, handle, [uneven])


def test_second_video_is_refused_for_attn(language):
    model = language("qwen2")
    ids = torch.tensor([GIVEN[0]])
    with vidtok.attach(model, decoder="attn_1_0.5") as handle:
        with handle.tokens(plain.visual(ids)):
            cache = model(input_ids=ids, use_cache=True).past_key_values
        start = len(GIVEN[0]) + 1
        refused = pytest.raises(ValueError, match="expected visual tokens in the first turn for attn")
        with handle.tokens([(0, start, start + 8)]), refused:
            model(input_ids=ids, past_key_values=cache)
