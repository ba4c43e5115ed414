"""Caches of a reduced prompt: static ones, beams, later turns, loops by hand, rollbacks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vidtok
from tests.models import tiny
from vidtok.models import cache as caches
from vidtok.models.visual import InputHook

CLOSE = {"rtol": 0, "atol": 2e-5}
TEXT = torch.arange(20, 27)[None]


def prompt(kind, rows):
    return tiny.batch(kind, tiny.ROWS[:rows])


def extended(inputs, tokens):
    """The prompt with more text behind it."""
    out = dict(inputs)
    out["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    out["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([types, types.new_zeros(tokens.shape)], 1)
    return out


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_static_cache_equals_dynamic(models, kind, rows):
    model, inputs = models(kind), prompt(kind, rows)
    with vidtok.attach(model, visual=tiny.drop):
        dynamic, _ = tiny.generate(model, inputs)
        for _ in range(2):  # the second call reuses the buffer of the first
            static, _ = tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, dynamic, **CLOSE)
    plain, _ = tiny.generate(model, inputs)
    static, _ = tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, plain, **CLOSE)


def test_static_masks_must_be_rebuilt(models, monkeypatch):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 3)
    prefill = InputHook._prefill

    def masks_of_the_unreduced_prompt(self, call, arguments, *rest):
        changed = prefill(self, call, arguments, *rest)
        changed["attention_mask"] = arguments["attention_mask"]
        return changed

    monkeypatch.setattr(InputHook, "_prefill", masks_of_the_unreduced_prompt)
    with vidtok.attach(model, visual=tiny.drop), pytest.raises((RuntimeError, ValueError, AttributeError)):
        tiny.generate(model, inputs, cache_implementation="static", disable_compile=True)


def test_caches_of_other_kinds_are_refused(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    with vidtok.attach(model, visual=tiny.drop), pytest.raises((TypeError, AttributeError)):
        model(**inputs, past_key_values=((torch.zeros(1, 2, 3, 4),) * 2,) * 3)


def test_static_cache_that_is_too_small(models):
    from transformers import StaticCache

    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=20)
    with vidtok.attach(model, visual=tiny.drop), pytest.raises(ValueError, match="at most 20 tokens"):
        model(**inputs, past_key_values=cache)


def test_sliding_windows():
    options = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model, inputs = tiny.make("qwen2_vl", **options), prompt("qwen2_vl", 1)
    assert "sliding_attention" in model.config.get_text_config().layer_types
    with vidtok.attach(model, visual=tiny.drop):
        cached, _ = tiny.generate(model, inputs)
        uncached, _ = tiny.generate(model, inputs, use_cache=False)
    torch.testing.assert_close(cached, uncached, **CLOSE)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_beam_search(models, kind):
    model, inputs = models(kind), prompt(kind, 3)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    if kind == "qwen3_vl" and tiny.VERSION[0] == 4:
        with pytest.raises(RuntimeError):  # listed in families.REFUSED
            model.generate(**inputs, **options)
        return
    with vidtok.attach(model, visual=tiny.merge):
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
        for i in range(3):
            alone = model.generate(**tiny.row(inputs, tiny.ROWS, i), **options)
            assert torch.equal(cached[i, -4:], alone[0, -4:])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_second_turn_on_the_returned_cache(models, kind, rows):
    model, inputs = models(kind), prompt(kind, rows)
    with vidtok.attach(model, visual=tiny.drop):
        _, first = tiny.generate(model, inputs)
        turn = extended(inputs, torch.cat([first.sequences[:, -5:], TEXT.expand(rows, -1)], 1))
        whole, _ = tiny.generate(model, turn, steps=3)
        for use in ({k: turn[k] for k in ("input_ids", "attention_mask")}, turn):
            cache = copy.deepcopy(first.past_key_values)
            assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4
            if use is turn and tiny.VERSION[0] == 4:
                continue  # takes pixels only together with an empty cache
            if use is turn:
                use = {k: v for k, v in turn.items() if "pixel" not in k}
            later, _ = tiny.generate(model, use, steps=3, past_key_values=cache)
            torch.testing.assert_close(later, whole, **CLOSE)


def test_second_turn_needs_the_logical_length(models, monkeypatch):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    with vidtok.attach(model, visual=tiny.drop):
        _, first = tiny.generate(model, inputs)
        turn = extended(inputs, torch.cat([first.sequences[:, -5:], TEXT], 1))
        whole, _ = tiny.generate(model, turn, steps=1)
        monkeypatch.setattr(caches.TwoLengths, "get_seq_length", caches.TwoLengths.get_query_offset)
        text = {k: turn[k] for k in ("input_ids", "attention_mask")}
        try:
            later, _ = tiny.generate(model, text, steps=1, past_key_values=first.past_key_values)
        except (RuntimeError, IndexError, ValueError):
            return
        assert (later - whole).abs().max() > 1e-2


def by_hand(model, inputs, tokens):
    """Logits of tokens fed one by one without position ids."""
    out = model(**inputs, use_cache=True)
    logits = [out.logits[:, -1]]
    at = inputs["input_ids"].shape[1]
    for i in range(tokens.shape[1]):
        more = {"cache_position": torch.tensor([at + i])} if tiny.VERSION[0] == 4 else {}
        out = model(input_ids=tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, **more)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loop_by_hand(models, kind, monkeypatch):
    model, inputs = models(kind), prompt(kind, 1)
    tokens = TEXT[:, :3]
    with vidtok.attach(model, visual=tiny.drop):
        whole = model(**extended(inputs, tokens), use_cache=False).logits[:, -4:]
        torch.testing.assert_close(by_hand(model, inputs, tokens), whole, **CLOSE)
        if tiny.VERSION[0] > 4:
            monkeypatch.setattr(caches.TwoLengths, "get_seq_length", caches.TwoLengths.get_query_offset)
            assert (by_hand(model, inputs, tokens) - whole).abs().max() > 1e-2


@pytest.mark.skipif(tiny.VERSION[0] == 4, reason="transformers 4.57 takes positions from cache_position")
def test_positions_of_the_whole_sequence_are_refused(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    with vidtok.attach(model, visual=tiny.drop):
        cache = model(**inputs).past_key_values
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="position_ids for the 1 tokens of this pass"):
            model(input_ids=TEXT[:, :1], attention_mask=mask, past_key_values=cache)


def test_decode_needs_the_mask_of_the_reduced_prompt(models, monkeypatch):
    model, inputs = models("qwen2_5_vl", "sdpa"), prompt("qwen2_5_vl", 3)
    with vidtok.attach(model, visual=tiny.drop):
        right, _ = tiny.generate(model, inputs, use_cache=False)
        monkeypatch.setattr(InputHook, "_continue", lambda *args: None)
        try:
            wrong, _ = tiny.generate(model, inputs)
        except (RuntimeError, ValueError, IndexError):
            return
        assert (wrong - right).abs().max() > 1e-3


def test_prompt_lookup_rolls_back(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1}
    with vidtok.attach(model, visual=tiny.drop):
        greedy = model.generate(**inputs, **options)
        lookup = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    # transformers 4.57 may overshoot max_new_tokens when every guess is right.
    assert torch.equal(greedy, lookup[:, : greedy.shape[1]])


def test_several_samples_per_prompt(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 2)
    with vidtok.attach(model, visual=tiny.drop):
        greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(out, greedy.repeat_interleave(2, 0))


def filled(model, inputs):
    return model(**inputs, use_cache=True).past_key_values


@torch.no_grad()
def test_cache_keeps_its_class_and_copies(models):
    from transformers import DynamicCache

    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 2)
    with vidtok.attach(model, visual=tiny.drop):
        cache = filled(model, inputs)
        assert isinstance(cache, DynamicCache)
        assert type(cache).__name__ == "DynamicCache"
        twin = copy.deepcopy(cache)
        assert twin.get_seq_length() == cache.get_seq_length() == inputs["input_ids"].shape[1]
        twin.batch_repeat_interleave(2)
        assert caches.state_of(twin).mask.shape[0] == 4
        assert caches.state_of(cache).mask.shape[0] == 2
        twin.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(caches.state_of(twin).mask, caches.state_of(cache).mask)
        twin.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(caches.state_of(twin).mask, caches.state_of(cache).mask.flip(0))
        with pytest.raises(ValueError, match="attached model"):
            pickle.dumps(cache)


@torch.no_grad()
def test_crop_keeps_to_the_text(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    with vidtok.attach(model, visual=tiny.drop):
        cache = filled(model, inputs)
        held = cache.layers[0].get_seq_length()
        cache.crop(-2)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 2
        assert cache.layers[0].get_seq_length() == held - 2
        if tiny.VERSION < (5, 18):
            cache.crop(inputs["input_ids"].shape[1] - 3)
            assert cache.layers[0].get_seq_length() == held - 3
        with pytest.raises(ValueError, match="expected to keep at least"):
            cache.crop(-20)


def test_reset_forgets_the_reduction(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    text = {"input_ids": TEXT, "attention_mask": torch.ones_like(TEXT)}
    plain, _ = tiny.generate(model, text)
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with vidtok.attach(model, visual=tiny.drop):
        tiny.generate(model, inputs, past_key_values=cache, disable_compile=True)
        assert cache.get_seq_length() > cache.layers[0].get_seq_length()
        cache.reset()
        assert caches.state_of(cache) is None
        again, _ = tiny.generate(model, text, past_key_values=cache, disable_compile=True)
    torch.testing.assert_close(again, plain, **CLOSE)


def test_cache_of_a_removed_attachment_is_refused(models):
    model, inputs = models("qwen2_5_vl"), prompt("qwen2_5_vl", 1)
    with vidtok.attach(model, visual=tiny.drop):
        cache = filled(model, inputs)
    with pytest.raises(ValueError, match="attachment was removed"):
        model(input_ids=TEXT, past_key_values=cache)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_video_after_a_padded_text_turn(models, kind):
    """The padding of an unreduced first turn stays masked in the second."""
    model, whole = models(kind), tiny.batch(kind, [tiny.ROWS[1], tiny.ROWS[2]])
    cut = int((whole["input_ids"] == tiny.START).nonzero()[:, 1].min())
    first = {"input_ids": whole["input_ids"][:, :cut], "attention_mask": whole["attention_mask"][:, :cut]}
    assert int(first["attention_mask"].sum()) < 2 * cut
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    positions = model.model.get_rope_index(**{k: whole[k] for k in names if k in whole})[0]
    with vidtok.attach(model, visual=tiny.drop):
        expected = model(**whole, use_cache=False).logits[:, -2:]
        cache = model(**first, position_ids=positions[..., :cut], use_cache=True).past_key_values
        second = {k: v[:, cut:] if k in ("input_ids", "mm_token_type_ids") else v for k, v in whole.items()}
        if tiny.VERSION[0] == 4:
            second["cache_position"] = torch.arange(cut, whole["input_ids"].shape[1])
        out = model(**second, position_ids=positions[..., cut:], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -2:], expected, **CLOSE)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_language_model_called_directly(models, kind):
    """A loop that bypasses the outer model still fits the reduced cache."""
    model, inputs = models(kind), prompt(kind, 2)
    language, tokens = model.model.language_model, TEXT[:, :3].expand(2, -1)
    with vidtok.attach(model, visual=tiny.drop):
        expected = model(**extended(inputs, tokens), use_cache=False).logits[:, -3:]
        out = model(**inputs, use_cache=True)
        cache, position = out.past_key_values, position_of(model, inputs, tokens)
        for i in range(3):
            at = position[..., -3 + i, None]
            hidden = language(
                inputs_embeds=model.get_input_embeddings()(tokens[:, i : i + 1]),
                position_ids=at,
                past_key_values=cache,
                use_cache=True,
                **({"cache_position": torch.tensor([cache.get_seq_length()])} if tiny.VERSION[0] == 4 else {}),
            )[0]
            torch.testing.assert_close(model.lm_head(hidden), expected[:, i : i + 1], **CLOSE)


def position_of(model, inputs, tokens):
    """Positions that the model itself gives to the prompt with more text behind it."""
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    longer = extended(inputs, tokens)
    return model.model.get_rope_index(**{k: longer[k] for k in names if k in longer})[0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_second_turn_with_another_video(models, kind):
    model, whole = models(kind), tiny.batch(kind, [[("video", 4, 84), ("video", 6, 56)]])
    last_video = -3 if kind == "qwen3_vl" else -1  # three runs of one frame
    cut = int((whole["input_ids"][0] == tiny.START).nonzero()[last_video]) - 1
    patches = int(whole["video_grid_thw"][0].prod())

    def part(low, high, videos, pixels):
        names = ("input_ids", "mm_token_type_ids", "attention_mask")
        out = {k: whole[k][:, low:high] for k in names if k in whole}
        out["attention_mask"] = whole["attention_mask"][:, :high]
        out["video_grid_thw"] = whole["video_grid_thw"][videos]
        out["pixel_values_videos"] = whole["pixel_values_videos"][pixels]
        if tiny.VERSION[0] == 4:
            out["cache_position"] = torch.arange(whole["input_ids"].shape[1])[low:high]
        return out

    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    positions = model.model.get_rope_index(**{k: whole[k] for k in names if k in whole})[0]
    with vidtok.attach(model, visual=tiny.merge):
        expected = model(**whole, use_cache=False).logits[:, -3:]
        first = part(0, cut, slice(0, 1), slice(0, patches))
        cache = model(**first, position_ids=positions[..., :cut], use_cache=True).past_key_values
        second = part(cut, None, slice(1, 2), slice(patches, None))
        out = model(**second, position_ids=positions[..., cut:], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -3:], expected, **CLOSE)
    assert cache.get_seq_length() == whole["input_ids"].shape[1]
