"""Scores of the decoder's visual tokens: rows that ask, rows of a batch, side effects, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny
from tests.models.texts import plain, ragged
from vidtok.models import attach, scoring
from vidtok.models.budgets import groups, keys, originals
from vidtok.models.drop import Drop
from vidtok.models.tokens import Tokens


def columns_of(drop: Drop, tokens: Tokens, labels: Tensor | None = None) -> list[list[int]]:
    return scoring.query_columns(scoring.queries(drop, tokens, labels)).tolist()


def test_which_rows_ask():
    _, tokens, labels = ragged()
    last, turns, question = (Drop("attn_1_0.5", query=q) for q in ("last", "turns", "question"))
    assert columns_of(last, tokens) == columns_of(turns, tokens) == [[39]] * 3
    assert columns_of(last, tokens, labels) == columns_of(turns, tokens, labels) == [[34]] * 3
    labels[1, 30:32] = 1
    assert columns_of(last, tokens, labels) == [[34]] * 3, "the last turn"
    assert columns_of(turns, tokens, labels) == [[34, -1], [29, 34], [34, -1]]
    assert columns_of(question, tokens)[0] == [*range(30, 40), *[-1] * 10]
    assert columns_of(question, tokens, labels)[0][:6] == [30, 31, 32, 33, 34, -1]
    assert columns_of(question, tokens, labels)[1][:8] == [26, 27, 28, 29, 32, 33, 34, -1], "no answer asks"
    labels[:] = -100
    assert columns_of(turns, tokens, labels) == [[39]] * 3, "no answer: as at inference"
    flipped = Tokens(tokens.unit.flip(1), tokens.frame.flip(1), tokens.units, tokens.valid.flip(1))
    assert columns_of(last, flipped) == [[31], [39], [19]], "right padding"


def test_a_row_of_a_batch_is_scored_as_if_alone():
    model = plain("Llama")
    layer = model.model.layers[1]
    ids, tokens, _ = ragged()
    hidden = model.get_input_embeddings()(ids).detach()
    position = model.model.rotary_emb(hidden, torch.arange(40)[None])
    for preset in ("timeviper", "pyramiddrop", "prunevid"):
        drop = Drop("attn_1_0.4", preset=preset)
        key = keys(drop, tokens)
        kept = scoring.select(
            drop, 0, key, originals(key), layer=layer, hidden=hidden, position_embeddings=position,
            valid=tokens.valid, asking=scoring.queries(drop, tokens),
        )  # fmt: skip
        assert 0 < sum(kept.dropped) < 32 and kept.dropped[2] == 0
        for i in range(3):
            real = tokens.valid[i]
            alone = Tokens(tokens.unit[i : i + 1, real], tokens.frame[i : i + 1, real], tokens.units)
            single = keys(drop, alone)
            part = scoring.select(
                drop, 0, single, originals(single), layer=layer, hidden=hidden[i : i + 1, real],
                position_embeddings=tuple(x[:, real] for x in position), asking=scoring.queries(drop, alone),
            )  # fmt: skip
            assert part.mask[0].tolist() == kept.mask[i, real].tolist(), (preset, i)


def test_training_decides_as_inference_does():
    model = plain("Llama")
    ids, tokens, labels = ragged()
    hidden = model.get_input_embeddings()(ids).detach()
    position = model.model.rotary_emb(hidden, torch.arange(40)[None])
    drop = Drop("attn_1_0.3", norm=True, rope=True)
    key = keys(drop, tokens)

    def choose(stop: int, labels: Tensor | None) -> Tensor:
        part = Tokens(tokens.unit[:, :stop], tokens.frame[:, :stop], tokens.units, tokens.valid[:, :stop])
        return scoring.select(
            drop, 0, key[:, :stop], originals(key), layer=model.model.layers[1], hidden=hidden[:, :stop],
            position_embeddings=tuple(x[:, :stop] for x in position), valid=part.valid,
            asking=scoring.queries(drop, part, labels),
        ).mask  # fmt: skip

    trained, inferred = choose(40, labels), choose(35, None)
    assert torch.equal(trained[:, :35], inferred)
    assert not torch.equal(choose(40, None)[:, :35], inferred), "asking with the answer's last token decides otherwise"


def test_weights_that_accelerate_keeps_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    inputs = tiny.batch("qwen2_5_vl", tiny.ROWS)
    want = None
    for offload in (False, True):
        model = tiny.make("qwen2_5_vl", layers=3)
        if offload:
            accelerate.cpu_offload(model, torch.device("cpu"))
            assert model.model.language_model.layers[1].self_attn.k_proj.weight.is_meta
        with attach(model, decoder=Drop("attn_1_0.4", norm=True, rope=True)):
            got = tiny.generate(model, inputs, 3)[0]
        want = got if want is None else want
    assert torch.equal(got, want)


class Noisy(nn.Linear):
    """A projection with an adapter's dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_scoring_draws_nothing_and_leaves_modes_alone():
    model = plain("Llama").train()
    layer = model.model.layers[1]
    layer.self_attn.k_proj.__class__ = Noisy
    ids, tokens, _ = ragged()
    hidden = model.get_input_embeddings()(ids)
    drop = Drop("attn_1_0.4")
    key = keys(drop, tokens)

    def choose() -> Any:
        chosen = groups(drop, 0, key, originals(key))
        return scoring.importance(drop, layer, hidden, None, chosen, tokens.valid, scoring.queries(drop, tokens))

    state = torch.get_rng_state()
    first, second = choose(), choose()
    assert torch.equal(first[1], second[1]) and not first[1].requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training and layer.self_attn.k_proj.training


def test_autocast_keeps_gradients_of_the_projections():
    model = plain("Llama")
    layer = model.model.layers[1]
    ids, tokens, _ = ragged()
    drop = Drop("attn_1_0.4", norm=True)
    key = keys(drop, tokens)

    def gradient() -> Tensor | None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.get_input_embeddings()(ids)
            scoring.select(
                drop, 0, key, originals(key), layer=layer, hidden=hidden, valid=tokens.valid,
                asking=scoring.queries(drop, tokens),
            )  # fmt: skip
            layer.self_attn.k_proj(hidden).sum().backward()
        return layer.self_attn.k_proj.weight.grad

    assert gradient() is not None


MEMORY = """
    import sys, torch
    torch.set_num_threads(1)
    from transformers import {name}Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding
    from vidtok.models import scoring
    from vidtok.models.budgets import keys, originals
    from vidtok.models.drop import Drop
    from vidtok.models.report import Unit
    from vidtok.models.tokens import Tokens

    config = {name}Config(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=64)
    config._attn_implementation = "sdpa"
    length, dtype = 23_000, torch.{dtype}
    layer = Qwen2DecoderLayer(config, 0).to(dtype)
    unit = torch.full((1, length), -1, dtype=torch.int32)
    unit[0, 100:22_900] = 0
    tokens = Tokens(unit, unit.clone(), [Unit("video", 0, (1, 120, 190))])
    position = Qwen2RotaryEmbedding(config)(torch.zeros(1, dtype=dtype), torch.arange(length)[None])
    drop = Drop("attn_1_0.3", norm=True, rope=True)
    key = keys(drop, tokens)
    original, asking = originals(key), scoring.queries(drop, tokens)
    def choose(n):
        return scoring.select(
            drop, 0, key[:, :n], original, layer=layer, hidden=hidden[:, :n],
            position_embeddings=tuple(x[:, :n] for x in position), asking=asking[:, -n:],
        )
    hidden = torch.empty(1, length, 3584, dtype=dtype).uniform_(-1, 1)
    choose(600)  # libraries set themselves up
    # Not ru_maxrss, which begins with what the parent held when it forked.
    def peak():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    kept = choose(length)
    assert kept.dropped == [22_800 - int(22_800 * 0.3)], kept.dropped
    print((peak() - before) / 1024)
"""


def test_scoring_23_000_tokens_takes_less_than_100_mb():
    script = textwrap.dedent(MEMORY).format(name="Qwen2", dtype="float32")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    megabytes = float(run.stdout.split()[-1])
    assert 1 < megabytes < 100
