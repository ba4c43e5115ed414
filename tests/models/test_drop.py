"""Specs of drops inside the decoder, counts, places and budgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtok.models.budgets import groups, keep_columns, keep_uniform, keys, originals
from vidtok.models.drop import PRESETS, Drop, Stage, resolve_drop, uniform
from vidtok.models.report import Unit
from vidtok.models.tokens import Tokens
from vidtok.spec import SpecError


@pytest.mark.parametrize(
    ("spec", "canonical", "stages"),
    [
        ("uni_7_0.8", "uni_7_0.8", [("uni", 7, 0.8)]),
        ("uni_14_0.8-uni_21_0.6-attn_30_0.4", None, [("uni", 14, 0.8), ("uni", 21, 0.6), ("attn", 30, 0.4)]),
        ("attn_0_1", "attn_0_1", [("attn", 0, 1.0)]),
        ("uni_007_.50-attn_8_0.50", "uni_7_0.5-attn_8_0.5", [("uni", 7, 0.5), ("attn", 8, 0.5)]),
        ("uni_1_0.00001", "uni_1_0.00001", [("uni", 1, 1e-5)]),
    ],
)
def test_a_spec_reads_as_its_stages_and_prints_canonically(spec, canonical, stages):
    drop = Drop(spec)
    assert [(s.kind, s.layer, s.ratio) for s in drop.stages] == stages
    assert str(drop) == (canonical or spec)
    assert str(Drop(str(drop))) == str(drop)
    assert "-".join(s.text for s in drop.stages) == spec
    assert drop == resolve_drop(spec) and resolve_drop(drop) is drop and hash(drop) == hash(resolve_drop(spec))


@pytest.mark.parametrize(
    ("spec", "part", "expected"),
    [
        ("", "", "type_layer_ratio, got nothing"),
        ("uni_7", "uni_7", "type_layer_ratio, got 2 fields"),
        ("uni_7_0.5_x", "uni_7_0.5_x", "type_layer_ratio, got 4 fields"),
        ("uni_7_0.5-", "''", "type_layer_ratio, got nothing"),
        ("unidrop_7_0.5", "unidrop_7_0.5", "one of uni, attn, got 'unidrop' (did you mean uni?)"),
        ("uni_7_0.5-random_8_0.2", "random_8_0.2", "one of uni, attn, got 'random'"),
        ("Uni_7_0.5", "Uni_7_0.5", "a type"),
        ("uni_x_0.5", "uni_x_0.5", "an integer layer of at least 0, got 'x'"),
        ("uni_1.0_0.5", "uni_1.0_0.5", "an integer layer of at least 0, got '1.0'"),
        ("uni_+1_0.5", "uni_+1_0.5", "an integer layer of at least 0, got '+1'"),
        ("uni_٣_0.5", "uni_٣_0.5", "an integer layer of at least 0, got '٣'"),
        ("uni_ 7_0.5", "uni_ 7_0.5", "an integer layer of at least 0, got ' 7'"),
        ("uni_-1_0.5", "uni_", "type_layer_ratio, got 2 fields"),
        ("uni_7_0.5e1", "uni_7_0.5e1", "a ratio as a decimal number, got '0.5e1'"),
        ("uni_7_nan", "uni_7_nan", "a ratio as a decimal number, got 'nan'"),
        ("uni_7_", "uni_7_", "a ratio as a decimal number, got ''"),
        ("uni_7_.", "uni_7_.", "a ratio as a decimal number, got '.'"),
        ("uni_7_0", "uni_7_0", "a ratio in (0, 1], got 0"),
        ("uni_7_1.01", "uni_7_1.01", "a ratio in (0, 1], got 1.01"),
        ("uni_7_0.5-attn_7_0.4", "attn_7_0.4", "layers that ascend, got 7 after 7"),
        ("uni_7_0.5-attn_3_0.2", "attn_3_0.2", "layers that ascend, got 3 after 7"),
        ("uni_7_0.5-attn_39_0.9", "attn_39_0.9", "ratios that do not rise, got 0.9 after 0.5"),
    ],
)
def test_an_error_shows_the_part_that_is_wrong(spec, part, expected):
    with pytest.raises(SpecError) as error:
        Drop(spec)
    message = str(error.value)
    assert expected in message and part in message
    assert message.startswith("bad spec ") and "\n" not in message


def test_long_and_foreign_input_is_refused():
    with pytest.raises(SpecError, match="at most 4096 characters"):
        Drop("uni_1_0.5-" * 1000)
    with pytest.raises(TypeError, match="expected a spec string, got int"):
        Drop(7)
    with pytest.raises(TypeError, match="expected a spec such as"):
        resolve_drop(0.5)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="uniatr_-.0123456789e+ \n", max_size=30))
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        drop = Drop(text)
    except SpecError as error:
        assert "\n" not in str(error).replace(repr(text), "")
    else:
        assert Drop(str(drop)).stages == tuple(Stage(s.kind, s.layer, s.ratio, str(s)) for s in drop.stages)


def test_the_papers_convention_is_accepted_only_when_asked_for():
    paper = Drop("uni_7_0.5-attn_39_0.9", convention="drop")
    assert paper.base == "current"
    assert [paper.keep(0, 100, 100), paper.keep(1, 100, 50)] == [50, 5]
    whole = Drop("uni_7_0.5-attn_39_0.9", convention="drop", base="original")
    assert [whole.keep(0, 100, 100), whole.keep(1, 100, 50)] == [50, 10]
    assert Drop("uni_7_0", convention="drop").keep(0, 10, 10) == 10
    with pytest.raises(SpecError, match=r"a dropped ratio in \[0, 1\), got 1"):
        Drop("uni_7_1", convention="drop")
    with pytest.raises(SpecError, match=r"ratios that do not fall, got 0\.5 after 0\.9"):
        Drop("uni_7_0.9-uni_8_0.5", convention="drop", base="original")


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        # ratio 0.29 of 100, 0.3 of 5, 0.1 of 5, then 0.29 of 100 where 40 are left
        (None, [28, 1, 1, 28]),
        ("timeviper", [28, 1, 0, 28]),
        ("pyramiddrop", [28, 1, 0, 28]),
        ("fastv", [29, 2, 0, 29]),
        ("vscan", [28, 1, 0, 11]),
        ("prunevid", [28, 1, 0, 11]),
    ],
)
def test_counts_are_rounded_as_each_reference_rounds(preset, counts):
    made = [
        Drop(f"attn_3_{r}", preset=preset).keep(0, n, c) for r, n, c in ((0.29, 100, 100), (0.3, 5, 5), (0.1, 5, 5))
    ]
    assert [*made, Drop("attn_3_0.29", preset=preset).keep(0, 100, 40)] == counts
    assert Drop("uni_3_0.9").keep(0, 100, 7) == 7, "never more than there are"


def test_presets_are_bundles_that_options_override():
    assert {name: (o["norm"], o["rope"], o["layer"], o["reduce"]) for name, o in PRESETS.items()} == {
        "timeviper": (False, False, "own", "mean"),
        "pyramiddrop": (True, True, "own", "mean"),
        "fastv": (True, True, "previous", "mean"),
        "vscan": (True, False, "own", "mean"),
        "prunevid": (True, True, "after", "max"),
    }
    drop = Drop("attn_3_0.5", preset="fastv", rope=False, rounding="int")
    assert (drop.norm, drop.rope, drop.rounding, drop.layer) == (True, False, "int", "previous")
    with pytest.raises(ValueError, match=r"one of timeviper, .* got 'fastvv' \(did you mean fastv\?\)"):
        Drop("uni_3_0.5", preset="fastvv")
    for option in ("query", "norm", "rope", "layer", "reduce", "budget", "convention", "rounding", "base"):
        with pytest.raises(ValueError, match=f"expected {option} to be one of .*, got 'x'"):
            Drop("uni_3_0.5", **{option: "x"})
    with pytest.raises(ValueError, match="expected merge to be None, 'transv' or a TransV"):
        Drop("uni_3_0.5", merge="tome")


def test_where_a_stage_scores_and_where_it_drops():
    spec = "uni_2_0.8-attn_5_0.5"
    assert [(Drop(spec, layer=where).entries, Drop(spec, layer=where).scorers) for where in ("own", "previous")] == [
        ((2, 5), (None, 5)),
        ((2, 5), (None, 4)),
    ]
    assert (Drop(spec, layer="after").entries, Drop(spec, layer="after").scorers) == ((3, 6), (None, 5))
    with pytest.raises(SpecError, match="a layer from 1 on"):
        Drop("attn_0_0.5", preset="fastv")


def test_stages_are_checked_against_the_decoder():
    Drop("uni_0_0.5-uni_27_0.5").validate(28)
    with pytest.raises(SpecError, match=r"a layer from 0 to 27 of the model's 28, got 28 in 'attn_28_0.2'"):
        Drop("uni_7_0.5-attn_28_0.2").validate(28)
    with pytest.raises(SpecError, match="a layer from 0 to 26 of the model's 28, got 27"):
        Drop("attn_27_0.5", layer="after").validate(28)
    hybrid = ["linear_attention", "mlp", "full_attention", "linear_attention", "full_attention"]
    Drop("uni_0_0.8-attn_2_0.5-uni_3_0.4-attn_4_0.2").validate(5, hybrid)
    with pytest.raises(SpecError, match=r"attn at an attention layer \(2, 4\), got layer 3 of kind linear_attention"):
        Drop("uni_0_0.8-attn_3_0.5").validate(5, hybrid)
    with pytest.raises(SpecError, match="got layer 1 of kind mlp"):
        Drop("attn_2_0.5", preset="fastv").validate(5, hybrid)
    Drop("attn_1_0.5").validate(2, ["full_attention", "sliding_attention"])
    with pytest.raises(SpecError, match="a layer that sees every token, got layer 0 of kind sliding_attention"):
        Drop("attn_1_0.5", preset="fastv").validate(2, ["sliding_attention", "full_attention"])


def test_uniform_places_are_integers_worked_out_by_hand():
    assert uniform(10, 5) == [0, 2, 4, 6, 9]
    assert uniform(16, 8) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert (uniform(9, 1), uniform(9, 0), uniform(0, 0), uniform(1, 1)) == ([0], [], [], [0])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_uniform_places_ascend_from_the_first_to_the_last(current, data):
    keep = data.draw(st.integers(1, current))
    places = uniform(current, keep)
    assert len(set(places)) == keep and places == sorted(places) and places[0] == 0
    assert keep == 1 or places[-1] == current - 1


# ---------------------------------------------------------------------- budgets
def layout(*rows: str) -> Tokens:
    """``.`` is padding, ``t`` text; a letter is a unit, upper and lower case its even and odd frames."""
    names = sorted({c.lower() for row in rows for c in row} - {".", "t"})
    unit = torch.tensor([[names.index(c.lower()) if c.lower() in names else -1 for c in row] for row in rows])
    frame = torch.tensor([[-1 if u < 0 else int(c.islower()) for c, u in zip(r, us)] for r, us in zip(rows, unit)])
    units = [Unit("video", next(i for i, r in enumerate(rows) if n in r.lower()), (2, 1, 1)) for n in names]
    valid = torch.tensor([[c != "." for c in row] for row in rows])
    return Tokens(unit.int(), frame.int(), units, valid)


TOKENS = layout("..tAAtaatBBBBt", "tCCCCCtccccctt", "ttttttttttt...")


def kept(drop: Drop, stage: int = 0, tokens: Tokens = TOKENS) -> list[str]:
    key = keys(drop, tokens)
    chosen = groups(drop, stage, key, originals(key))
    result = keep_uniform(chosen, key)
    assert result.dropped == (~result.mask).sum(1).tolist()
    return ["".join("x" if m else "-" for m in row) for row in result.mask.tolist()]


def test_a_video_shares_one_budget_with_all_its_runs_and_text_stays():
    assert kept(Drop("uni_2_0.5")) == ["xxxx-x-xxx--xx", "xx-x-xx-x--xxx", "x" * 14]
    assert kept(Drop("uni_2_0.5", budget="frame")) == ["xxxx-xx-xx--xx", "xx---xxx---xxx", "x" * 14]
    assert kept(Drop("uni_2_0.5", budget="sample")) == ["xxxx-xx-xx--xx", "xx-x-xx-x--xxx", "x" * 14]


def test_keep_all_drops_nothing_and_few_tokens_leave_one():
    assert kept(Drop("uni_2_1")) == ["x" * 14] * 3
    one = kept(Drop("uni_2_0.01"))
    assert [row.count("-") for row in one] == [3 + 3, 9, 0]
    assert [row.count("-") for row in kept(Drop("uni_2_0.01", preset="timeviper"))] == [8, 10, 0]


def test_a_later_stage_counts_from_what_entered():
    drop = Drop("uni_2_0.5-uni_4_0.3")
    key = keys(drop, TOKENS)
    original = originals(key)
    assert sorted(original.values()) == [4, 4, 10]
    first = keep_uniform(groups(drop, 0, key, original), key)
    present = torch.where(first.mask, key, -1)
    second = groups(drop, 1, present, original)
    assert (second.current, second.keep) == ([2, 2, 5], [1, 1, 3])
    assert groups(Drop("uni_2_0.5-uni_4_0.3", base="current"), 1, present, original).keep == [1, 1, 1]


def test_groups_may_interleave():
    tokens = layout("tAAAAAAAAt")
    group = torch.tensor([[-1, 5, 3, 5, 5, 3, 3, 5, 3, -1]])
    drop = Drop("uni_2_0.5", budget="group")
    key = keys(drop, tokens, group)
    chosen = groups(drop, 0, key, originals(key))
    assert (chosen.current, chosen.keep, chosen.row) == ([4, 4], [2, 2], [0, 0])
    assert chosen.columns.tolist() == [1, 3, 4, 7, 2, 5, 6, 8]
    assert keep_uniform(chosen, key).mask[0].int().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert keys(drop, tokens).unique().numel() == 2, "frames without groups"


def test_a_batch_without_visual_tokens_keeps_everything():
    tokens = layout("ttt", ".tt")
    drop = Drop("attn_2_0.5")
    key = keys(drop, tokens)
    chosen = groups(drop, 0, key, originals(key))
    assert (chosen.key, chosen.span) == ([], [])
    assert keep_columns(chosen, key, chosen.columns).mask.all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_budget_keeps_its_count_and_text_stays(data):
    names = st.text(alphabet=".tAaBbC", min_size=12, max_size=12)
    rows = data.draw(st.lists(names, min_size=1, max_size=3))
    # A unit lies in one row.
    rows = ["".join(chr(ord(c) + 5 * i) if c in "AaBbC" else c for c in row) for i, row in enumerate(rows)]
    tokens = layout(*rows)
    ratio = data.draw(st.sampled_from(["0.01", "0.3", "0.5", "0.77", "1"]))
    drop = Drop(
        f"uni_1_{ratio}",
        budget=data.draw(st.sampled_from(["item", "frame", "sample", "group"])),
        rounding=data.draw(st.sampled_from(["int", "int_min1", "round"])),
    )
    key = keys(drop, tokens)
    original = originals(key)
    result = keep_uniform(groups(drop, 0, key, original), key)
    assert result.mask[tokens.unit < 0].all()
    for number, count in original.items():
        assert int(result.mask[key == number].sum()) == drop.keep(0, count, count)
    assert result.dropped == (~result.mask).sum(1).tolist()
    if drop.budget != "sample":
        assert sum(original.values()) == int((tokens.unit >= 0).sum())
