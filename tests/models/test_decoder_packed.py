"""Drops inside the decoder in samples that are packed into one row."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.models import flash, plain
from vidtok.models.unpacked import Unpacked

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


def packed(given):
    """One row of several, told apart by position ids that restart."""
    ids = torch.tensor([[token for row in given for token in row]])
    return ids, torch.cat([torch.arange(len(row)) for row in given])[None]


@pytest.mark.parametrize("position", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixed"])
@pytest.mark.parametrize("spec", ["uni_1_0.5-uni_3_0.25", "attn_1_0.5-attn_3_0.25"])
def test_packed_rows_equal_each_sample_alone(language, kind, spec, attention, position):
    ids, restart = packed(GIVEN)
    with flash.installed():
        model = language(kind, attention)
        drop = vidtok.Drop(spec, budget="frame" if "uni" in spec else "sample", rope=True)
        with vidtok.attach(model, decoder=drop, position=position) as handle:
            with handle.tokens(plain.visual(ids)):
                got = model(input_ids=ids, position_ids=restart, use_cache=False).logits[0]
            alone = []
            for row in GIVEN:
                one = torch.tensor([row])
                with handle.tokens(plain.visual(one)):
                    alone.append(model(input_ids=one, use_cache=False).logits[0])
    torch.testing.assert_close(got, torch.cat(alone), **CLOSE)


def test_lengths_of_samples_follow(language):
    """flash attention reads them instead of the positions."""
    ids, restart = packed(GIVEN)
    borders = torch.tensor([0, *(len(row) for row in GIVEN)]).cumsum(0).int()
    longest = max(map(len, GIVEN))
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    labels = torch.where(plain.visual(ids), -100, ids)
    with flash.installed() as calls:
        model = language("qwen2", "flash_attention_2")
        with vidtok.attach(model, decoder="uni_1_0.5-attn_3_0.25") as handle, handle.tokens(plain.visual(ids)):
            want = model(input_ids=ids, position_ids=restart, labels=labels, use_cache=False)
            calls.clear()
            got = model(input_ids=ids, position_ids=restart, labels=labels, use_cache=False, **lengths)
            assert len(calls) == 4 and all(samples == 3 for _, samples, _ in calls)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


def test_packed_rows_with_a_cache_are_refused(language):
    """transformers does not part packed rows in a pass that fills a cache."""
    model = language("qwen2")
    ids, restart = packed(GIVEN)
    refused = pytest.raises(ValueError, match="expected use_cache=False with packed samples")
    with vidtok.attach(model, decoder="uni_1_0.5") as handle, handle.tokens(plain.visual(ids)), refused:
        model(input_ids=ids, position_ids=restart, use_cache=True)


def test_packing_and_back():
    sample = torch.tensor([[-1, 0, 0, 1, 2, 2], [0, 0, 0, -1, 1, 1]])
    rows = Unpacked(sample)
    x = torch.arange(12).view(2, 6)
    want = [[-1, 1, 2], [-1, -1, 3], [-1, 4, 5], [6, 7, 8], [-1, 10, 11]]
    assert rows.unpack(x, -1).tolist() == want
    assert torch.equal(rows.pack(rows.unpack(x, 0), -1), x.masked_fill(sample < 0, -1))
    assert Unpacked(torch.zeros(2, 3).long()).valid is None
