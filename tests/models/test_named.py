"""Plain language models: the caller names the visual tokens."""

from __future__ import annotations

import threading

import pytest
import torch

import vidtok
from tests.models import flash, plain, tiny

KINDS = ["qwen2", "qwen3", "llama", "mistral"] + (["nemotron_h"] if tiny.VERSION >= (5, 17) else [])
TEXT = {"mistral": {"sliding_window": 16}, "qwen3": {"head_dim": 16}}
ROWS = [(5, 24, 6), (3, 32, 9), (7, 16, 4)]
STEPS = 3


def prompt():
    """Left-padded rows and the columns of a video of eight frames in each."""
    g = torch.Generator().manual_seed(0)
    length = max(map(sum, ROWS))
    ids, mask = torch.zeros(2, 3, length, dtype=torch.long)
    spans = []
    for i, (before, visual, after) in enumerate(ROWS):
        first = length - before - visual - after
        ids[i, first:] = torch.randint(5, 240, (length - first,), generator=g)
        mask[i, first:] = 1
        spans.append((i, first + before, first + before + visual))
    return ids, mask, spans


def steps(model, ids, tokens, mask=None, answers=False):
    """Logits of each step, computed from the start; with ``answers`` the last token of the prompt goes on asking."""
    out = []
    for n in range(tokens.shape[1]):
        given = {} if mask is None else {"attention_mask": torch.cat([mask, torch.ones_like(tokens[:, :n])], 1)}
        if answers:
            given["labels"] = torch.cat([torch.full_like(ids, -100), tokens[:, :n]], 1)
        out.append(model(input_ids=torch.cat([ids, tokens[:, :n]], 1), use_cache=False, **given).logits[:, -1])
    return torch.stack(out, 1)


def far(a, b):
    """Largest difference."""
    return (a - b).abs().max().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_equals_uncached_equals_alone(kind, attention):
    model = plain.make(kind, attention, **TEXT.get(kind, {}))
    ids, mask, spans = prompt()
    before = model(input_ids=ids, attention_mask=mask).logits
    with vidtok.attach(model, visual=tiny.drop) as handle:
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        with handle.tokens(spans, frames=8):
            got, out = tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, STEPS)
            tokens = out.sequences[:, -STEPS:]
            assert far(got, steps(model, ids, tokens, mask)) < 2e-5
            embeds = model.get_input_embeddings()(ids)
            assert far(model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1], got[:, 0]) < 2e-5
        report = handle.report()
        assert report.tokens_in == [35, 44, 27] and report.tokens_out == [23, 28, 19]
        assert [sample.grid_thw[0] for sample in report.samples] == [8, 8, 8]
        for i, (first, visual, last) in enumerate(ROWS):
            own = ids[i : i + 1, -(first + visual + last) :]
            with handle.tokens([(0, first, first + visual)], frames=8):
                assert far(got[i : i + 1], steps(model, own, tokens[i : i + 1])) < 2e-5
        assert far(got[:, 0], before[:, -1]) > 1e-2
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["uni", "attn", "both"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_drops_between_layers(kind, how, attention):
    model = plain.make(kind, attention, **TEXT.get(kind, {}))
    ids, mask, spans = prompt()
    at = (2, 4) if kind == "nemotron_h" else (1, 2)
    spec = {"uni": "uni_{}_0.5-uni_{}_0.25", "attn": "attn_{}_0.5-attn_{}_0.25", "both": "uni_{}_0.75-attn_{}_0.25"}[
        how
    ]
    before = model(input_ids=ids, attention_mask=mask).logits
    with vidtok.attach(model, visual=tiny.drop if how == "both" else None, decoder=spec.format(*at)) as handle:
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        with handle.tokens(spans, frames=8):
            got, out = tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, STEPS)
            tokens = out.sequences[:, -STEPS:]
            assert far(got, steps(model, ids, tokens, mask, how != "uni")) < 2e-5
        share = 2 if how == "both" else 1
        held = {layer.keys.shape[2] for layer in out.past_key_values.layers if getattr(layer, "keys", None) is not None}
        if kind != "mistral":
            last = max(a + v // share // 4 + b for a, v, b in ROWS) + STEPS - 1
            assert min(held) == last, (held, last)
        for i, (first, visual, last) in enumerate(ROWS):
            own = ids[i : i + 1, -(first + visual + last) :]
            with handle.tokens([(0, first, first + visual)], frames=8):
                assert far(got[i : i + 1], steps(model, own, tokens[i : i + 1], None, how != "uni")) < 2e-5
        assert far(got[:, 0], before[:, -1]) > 1e-2
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_attn_needs_an_attention_layer():
    if "nemotron_h" in KINDS:
        with pytest.raises(ValueError, match="attn at an attention layer"):
            vidtok.attach(plain.make("nemotron_h"), decoder="attn_1_0.5")


@torch.no_grad()
def test_mask_and_token_id_name_the_same():
    model = plain.make("qwen2")
    ids, mask, spans = prompt()
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, start, stop in spans:
        where[row, start:stop] = True
    ids[where] = 255
    with vidtok.attach(model, visual=tiny.drop) as handle:
        with handle.tokens(spans):
            first = model(input_ids=ids, attention_mask=mask).logits
        with handle.tokens(where):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, first)
    with vidtok.attach(model, visual=tiny.drop, visual_token_id=255):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, first)
        got, out = tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, STEPS, suppress_tokens=[255])
        assert far(got, steps(model, ids, out.sequences[:, -STEPS:], mask)) < 2e-5


@torch.no_grad()
def test_beams_repeat_the_rows_of_a_mask():
    model = plain.make("qwen2")
    ids, mask, spans = prompt()
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, start, stop in spans:
        where[row, start:stop] = True
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": STEPS}
    with vidtok.attach(model, visual=tiny.drop) as handle, handle.tokens(where, frames=8):
        cached = model.generate(input_ids=ids, attention_mask=mask, **options)
        uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("hooks", [{"visual": tiny.drop}, {"decoder": "uni_2_0.5"}, {"decoder": "attn_2_0.5"}])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_flash_attention_and_static_caches(kind, hooks):
    ids, mask, spans = prompt()
    inputs = {"input_ids": ids, "attention_mask": mask}
    row = {"input_ids": ids[:1, -35:]}
    with flash.installed():
        logits = []
        for attention in ("sdpa", "flash_attention_2"):
            model = plain.make(kind, attention, **TEXT.get(kind, {}))
            with vidtok.attach(model, **hooks) as handle:
                with handle.tokens(spans, frames=8):
                    logits.append(tiny.generate(model, inputs, STEPS)[0])
                with handle.tokens([(0, 5, 29)], frames=8):
                    assert far(model(**row, use_cache=False).logits[0, -1], logits[-1][0, 0]) < 2e-5
                    # Recomputed without cache nor mask, as in training: gaps must not look like packed rows.
                if tiny.VERSION[0] > 4 and attention == "sdpa" and kind != "nemotron_h":
                    with handle.tokens(spans, frames=8):
                        logits.append(tiny.generate(model, inputs, STEPS, cache_implementation="static")[0])
    assert all(far(logits[0], other) < 2e-5 for other in logits[1:])


@torch.no_grad()
def test_generation_from_embeddings():
    model = plain.make("qwen2")
    ids, mask, spans = prompt()
    embeds = model.get_input_embeddings()(ids)
    with vidtok.attach(model, visual=tiny.drop, decoder="uni_2_0.5") as handle, handle.tokens(spans, frames=8):
        right, _ = tiny.generate(model, {"input_ids": ids, "attention_mask": mask}, STEPS)
        got, _ = tiny.generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, STEPS)
    assert far(got, right) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_a_shorter_row(kind):
    """Counted anew, a reduced row is just a shorter one."""
    model = plain.make(kind, layers=2, **TEXT.get(kind, {}))
    ids, _, _ = prompt()
    ids = ids[:1, -35:].clone()
    labels = ids.clone()
    labels[:, :29] = -100
    embeds = model.get_input_embeddings()(ids).detach()
    plan = tiny.drop(embeds[0, 5:29], torch.tensor([[8, 1, 3]]))
    kept = torch.cat([torch.arange(5), 5 + plan.anchor.long(), torch.arange(29, 35)])
    model(inputs_embeds=embeds[:, kept], labels=labels[:, kept]).loss.backward()
    right = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with vidtok.attach(model, visual=tiny.drop, position="renumber") as handle, handle.tokens([(0, 5, 29)], frames=8):
        model(inputs_embeds=embeds, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, right[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_second_turn_counts_earlier_columns():
    if tiny.VERSION[0] == 4:
        return
    model = plain.make("qwen2")
    g = torch.Generator().manual_seed(5)
    one, two = (torch.randint(5, 240, (1, n), generator=g) for n in (30, 26))
    both = torch.cat([one, two], 1)
    with vidtok.attach(model, visual=tiny.drop) as handle, handle.tokens([(0, 4, 24), (0, 36, 52)], frames=4):
        held = model(input_ids=one, use_cache=True).past_key_values
        got = model(input_ids=two, past_key_values=held).logits[:, -1]
        assert held.get_query_offset() == 30 + 26 - 10 - 8
        assert far(got, model(input_ids=both, use_cache=False).logits[:, -1]) < 2e-5


@torch.no_grad()
def test_other_threads_are_not_named():
    model = plain.make("qwen2")
    ids, mask, spans = prompt()
    whole = model(input_ids=ids, attention_mask=mask).logits
    found = []

    def run():
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask).logits)

    with vidtok.attach(model, visual=tiny.drop) as handle, handle.tokens(spans):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(found[0], whole)


@torch.no_grad()
def test_named_tokens_take_the_place_of_found_ones():
    model = tiny.make("qwen2_5_vl", layers=2)
    inputs = tiny.batch("qwen2_5_vl", [[("video", 4, 56), ("video", 4, 56)]])
    columns = (inputs["input_ids"][0] == tiny.VIDEO).nonzero().squeeze(1)
    first = (0, int(columns[0]), int(columns[0]) + 8)
    with vidtok.attach(model, visual=tiny.drop) as handle, handle.tokens([first], frames=2):
        model(**inputs)
        assert [(s.tokens_in, s.tokens_out) for s in handle.report().samples] == [(8, 4)]


def test_refusals():
    model = plain.make("qwen2", layers=1)
    ids, mask, _ = prompt()
    with vidtok.attach(model, visual=tiny.drop) as handle:
        for where, frames, what in (
            ([(0, 4, 4)], 1, "start < stop"),
            ([(0, 4, 8), (0, 6, 9)], 1, "do not overlap"),
            ([(0, 4, 8)], 3, "frames of equal size"),
            ([(0, 4, 8)], [1, 2], "frames for 1 stretches"),
            (mask, 1, "bool mask"),
        ):
            with pytest.raises(ValueError, match=what), handle.tokens(where, frames):
                raise AssertionError(where)
        for where, what in (([(3, 4, 8)], "rows 0 to 2"), ([(0, 40, 48)], "in one pass")):
            with pytest.raises(ValueError, match=what), handle.tokens(where):
                model(input_ids=ids, attention_mask=mask)
        assert not model.model._forward_pre_hooks or handle.active
    with pytest.raises(ValueError, match="plain language model only"):
        vidtok.attach(tiny.make("qwen2_vl", layers=1), visual=tiny.drop, visual_token_id=255)


@pytest.mark.parametrize("decoder", ["attn_2_0.5", vidtok.Drop("uni_2_0.5", merge="transv")])
@torch.no_grad()
def test_a_prompt_in_parts_is_refused_where_its_end_counts(decoder):
    """The last token of a part is not that of the prompt, also when the part holds the whole video."""
    model = plain.make("qwen2")
    ids, _, spans = prompt()
    _, start, stop = spans[0]
    given = {"input_ids": ids[:1, start - 5 :], "do_sample": False, "max_new_tokens": 2, "prefill_chunk_size": 31}
    where = [(0, 5, 5 + stop - start)]
    with vidtok.attach(model, decoder="uni_2_0.5") as handle, handle.tokens(where):
        whole = model.generate(**{**given, "prefill_chunk_size": None})
        assert torch.equal(model.generate(**given), whole)
    with vidtok.attach(model, decoder=decoder) as handle, handle.tokens(where):
        model.generate(**{**given, "prefill_chunk_size": None})
        with pytest.raises(ValueError, match="expected the whole prompt in one pass"):
            model.generate(**given)


@pytest.mark.parametrize("decoder", ["attn_1_0.5", vidtok.Drop("uni_1_0.5", preset="timeviper")])
@torch.no_grad()
def test_a_decoded_token_is_text(decoder):
    """Also when the model chooses the id of visual tokens."""
    model = plain.make("qwen2")
    ids = torch.tensor([[5, 6, 7] + [205] * 8 + [9, 10]])
    with vidtok.attach(model, decoder=decoder, visual_token_id=205) as handle:
        cache = model(input_ids=ids).past_key_values
        got = model(input_ids=torch.tensor([[205]]), past_key_values=cache).logits[:, -1]
        assert cache.get_seq_length() == 14
        whole = torch.cat([ids, torch.tensor([[205]])], 1)
        labels = torch.tensor([[-100] * 13 + [205]])
    with vidtok.attach(model, decoder=decoder) as handle, handle.tokens([(0, 3, 11)]):
        alone = model(input_ids=whole, labels=labels, use_cache=False).logits[:, -1]
    assert far(got, alone) < 2e-5
