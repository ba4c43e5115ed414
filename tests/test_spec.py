"""Spec strings: grammar, types, canonical form, errors, pipelines, and anything that is thrown at them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vidtok import Plan, methods, ops, spec
from vidtok.spec import Pipeline, SpecError, Stage

GRIDS = [(4, 4, 4), (2, 3, 3)]


def features() -> torch.Tensor:
    return torch.randn(82, 32, generator=torch.Generator().manual_seed(0))


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("prunevid", "prunevid"),
            ("prunevid:tau=0.8,cluster_ratio=0.5", "prunevid"),
            ("prunevid:cluster_ratio=.25,tau=9e-1", "prunevid:tau=0.9,cluster_ratio=0.25"),
            ("uniform:ratio=1", "uniform:ratio=1"),
            ("uniform:ratio=0.5,images=true", "uniform:ratio=0.5,images=true"),
            ("uniform:images=false,ratio=0.5", "uniform:ratio=0.5"),
            ("random:seed=0,k=7", "random:k=7"),
            ("random : k = 7 , seed = 3", "random:k=7,seed=3"),
            ("dtd:threshold=-0.5,relative=false", "dtd:threshold=-0.5"),
            ("dtd:relative=true,threshold=0.5", "dtd:threshold=0.5,relative=true"),
            ("evs:ratio=0.3", "evs:ratio=0.3"),
            ("tome:r=[8,8,4]", "tome:r=[8,8,4]"),
            ("tome:r=[ 8 , 4 ]", "tome:r=[8,4]"),
            ("tome:r=8,metric=features", "tome:r=8,metric=features"),
            ("pool:out_hw=(12,6)", "pool:out_hw=(12,6)"),
            ("pool:out_hw=[12,6]", "pool:out_hw=(12,6)"),
            ("pool:level=2.5", "pool:level=2.5"),
            ("prunevid+uniform:ratio=0.5", "prunevid+uniform:ratio=0.5"),
            (" prunevid : tau=0.9 + uniform:k=4 ", "prunevid:tau=0.9+uniform:k=4"),
            ("prunevid+uniform:k=4,images=true", "prunevid:images=true+uniform:k=4"),
            ("pool:level=2+prunevid+random:k=4", "pool:level=2+prunevid+random:k=4"),
        ],
    )
    def test_canonical(self, text, canonical):
        pipeline = spec.parse(text)
        assert str(pipeline) == canonical
        assert str(spec.parse(canonical)) == canonical

    def test_values_have_types(self):
        (stage,) = spec.parse("uniform:ratio=1").stages
        assert type(stage.options["ratio"]) is float
        (stage,) = spec.parse("tome:r=[8,8,4]").stages
        assert stage.options == {"r": [8, 8, 4]}
        (stage,) = spec.parse("pool:out_hw=(12,6)").stages
        assert stage.options == {"out_hw": (12, 6)}

    def test_images(self):
        assert spec.parse("uniform:k=4,images=true").images is True
        assert spec.parse("uniform:k=4,images=false").images is False
        assert spec.parse("uniform:k=4").images is False
        assert spec.parse("prunevid:images=true+uniform:k=4").images is True

    @pytest.mark.parametrize("name", methods.METHODS)
    def test_keys_are_the_options_of_the_functions(self, name):
        import inspect

        parameters = inspect.signature(getattr(methods, name)).parameters
        method = methods.METHODS[name]
        assert list(method.kinds) == [p for p in parameters if p not in ("features", "grid_thw")]
        for key in method.kinds:
            default = parameters[key].default
            assert (default is inspect.Parameter.empty) == (key not in method.defaults)
            assert key not in method.defaults or default == method.defaults[key]


ERRORS = {
    "": "expected a method name",
    "  ": "expected a method name",
    "+": "expected a method name",
    "prunevid+": "expected a method name",
    ":tau=1": "expected a method name",
    "prunvid": r"got 'prunvid' \(did you mean prunevid\?\)",
    "PruneVid": "did you mean prunevid",
    "uniform;k=3": "expected a method",
    "zzz": r"expected a method: one of dtd, evs, .*, got 'zzz' in|got 'zzz'$",
    "prunevid:tua=1": r"got 'tua' \(did you mean tau\?\) in 'prunevid:tua=1'|got 'tua' \(did you mean tau\?\)$",
    "evs:ratio=0.5+uniform:raito=0.5": r"got 'raito' \(did you mean ratio\?\) in 'uniform:raito=0.5'",
    "prunevid:": "expected key=value after the colon, got ''",
    "prunevid:tau": "expected key=value after the colon, got 'tau'",
    "prunevid:tau=0.8,": "expected key=value",
    "prunevid:=3": "expected key=value",
    "prunevid:tau=": "expected a value: a number in 'tau='",
    "prunevid:tau=high": "expected a finite number, got 'high' in 'tau=high'",
    "prunevid:tau=nan": "expected a finite number",
    "prunevid:tau=1e999": "expected a finite number",
    "prunevid:tau=0x1": "expected a finite number",
    "prunevid:tau=1_0": "expected a finite number",
    "prunevid:tau=٣": "expected a finite number",
    "prunevid:tau=true": "expected a finite number",
    "prunevid:tau=0.8,tau=0.8": "expected tau once",
    "prunevid:tau=1.5": r"prunevid: expected tau in \[-1, 1\], got 1.5",
    "prunevid:k=7.0": "expected an integer in 'k=7.0'",
    "prunevid:k=[7]": "expected an integer",
    "prunevid:k=0": "expected k as an integer ≥ 1, got 0",
    "uniform": "expected exactly one of ratio and k, got none",
    "uniform:ratio=0.5,k=3": "expected exactly one of ratio and k, got ratio and k",
    "uniform:ratio=0": r"expected ratio in \(0, 1\], got 0.0",
    "uniform:ratio=1.01": r"expected ratio in \(0, 1\], got 1.01",
    "uniform:ratio=-0.5": r"expected ratio in \(0, 1\]",
    "random:k=3,seed=-1": "expected seed",
    "evs": "expected ratio=",
    "dtd:relative=true": "expected threshold=",
    "dtd:threshold=0.5,relative=1": "expected true or false in 'relative=1'",
    "dtd:threshold=0.5,relative=yes": "expected true or false",
    "uniform:k=3,images=2": "expected true or false",
    "uniform:k=3,images=true+random:k=2,images=false": "expected images to be true or false for the whole pipeline",
    "tome:r=[8,8": r"expected '\[' to be closed",
    "tome:r=8]": "expected brackets that match",
    "tome:r=[8)": "expected brackets that match",
    "tome:r=[[8]]": "expected brackets that do not nest",
    "tome:r=[]": "expected an integer, a list of integers",
    "tome:r=[8,,4]": "expected a finite number, got ''",
    "tome:r=[8]4": "expected",
    "tome:r=4[8]": "expected",
    "tome:r=[+8]": "expected a finite number",
    "tome:r=[8.5]": "expected an integer, a list of integers",
    "tome:r=(8,-1)": "a pair is a schedule over the layers of a vision tower",
    "tome:k=3,metric=1": "expected a word",
    "tome:k=3,metric=other": "expected metric as groups or features",
    "tome:r=3,k=3": "expected exactly one of r and ratio and k",
    "pool:out_hw=3": "expected a pair of integers",
    "pool:out_hw=(3,3,3)": "expected a pair of integers",
    "pool:out_hw=(0,3)": "expected out_hw as an integer ≥ 1",
    "pool:level=0.5": r"expected level in \[1, inf\)",
    "uniform:k=3+prunevid": "expected prunevid before uniform",
    "pool:level=2+uniform:k=3+evs:ratio=1": "expected evs before uniform",
    "prunevid+tome:k=3": "expected tome before prunevid",
}


class TestErrors:
    @pytest.mark.parametrize("text", ERRORS)
    def test_says_what_was_expected(self, text):
        with pytest.raises(SpecError, match=ERRORS[text]) as info:
            spec.parse(text)
        message = str(info.value)
        assert message.startswith("bad spec ") and "\n" not in message and len(message) < 500
        assert isinstance(info.value, ValueError) and info.value.__cause__ is None

    def test_whole_spec_is_shown(self):
        with pytest.raises(SpecError, match=r"bad spec 'evs:ratio=0.5\+uniform:ratio=2': uniform: expected ratio"):
            spec.parse("evs:ratio=0.5+uniform:ratio=2")

    def test_too_long(self):
        with pytest.raises(SpecError, match="at most 4096 characters, got 100000"):
            spec.parse("a" * 100_000)

    def test_not_a_string(self):
        for value in (None, 3, ["uniform"], b"uniform", Plan):
            with pytest.raises(TypeError, match="expected a spec string"):
                spec.resolve(value)
        with pytest.raises(TypeError, match="expected a spec string, got int"):
            spec.parse(3)

    def test_stages_check_themselves(self):
        with pytest.raises(SpecError, match=r"did you mean tau\?"):
            Stage("prunevid", {"tua": 1})
        with pytest.raises(SpecError, match="expected an integer"):
            Stage("uniform", {"k": 1.5})
        with pytest.raises(SpecError, match="at least one stage"):
            Pipeline(())


class TestPipelines:
    @pytest.mark.parametrize(
        "text", ["uniform:ratio=0.3", "prunevid", "tome:k=3", "pool:out_hw=(2,2)", "evs:ratio=0.4"]
    )
    def test_one_stage_is_the_function(self, text):
        x = features()
        (stage,) = spec.parse(text).stages
        plan = spec.resolve(text)(x, GRIDS).validate()
        expected = getattr(methods, stage.name)(x, GRIDS, **stage.options)
        assert torch.equal(plan.anchor, expected.anchor) and torch.equal(plan.weight, expected.weight)

    def test_stages_compose(self):
        x = features()
        first = methods.prunevid(x, GRIDS)
        y = ops.plan_apply(first, x)
        counts = first.lengths_out()
        second = methods.uniform(y, [(n, 1, 1) for n in counts], ratio=0.5)
        plan = spec.resolve("prunevid+uniform:ratio=0.5")(x, torch.tensor(GRIDS)).validate()
        assert torch.equal(plan.anchor, first.compose(second).anchor)
        assert plan.lengths_out() == [max(1, n // 2) for n in counts]
        torch.testing.assert_close(ops.plan_apply(plan, x), ops.plan_apply(second, y))

    def test_pooling_gives_a_grid_again(self):
        x = features()
        pooled = ops.pool_packed(x, GRIDS, level=2)
        plan = spec.resolve("pool:level=2+evs:ratio=0.5")(x, GRIDS).validate()
        second = methods.evs(pooled.x, pooled.grid_thw, ratio=0.5)
        assert plan.lengths_out() == second.lengths_out()
        torch.testing.assert_close(ops.plan_apply(plan, x), ops.plan_apply(second, pooled.x))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("uniform:ratio=0.5", [32, 9]),
            ("pool:level=2+evs:ratio=0.5", [8, 4]),
            ("evs:ratio=0.5+random:k=10", [10, 9]),
            ("prunevid", None),
            ("dtd:threshold=0.5+uniform:k=3", None),
        ],
    )
    def test_count(self, text, expected):
        pipeline = spec.parse(text)
        assert pipeline.count(GRIDS) == expected
        assert expected is None or pipeline(features(), GRIDS).lengths_out() == expected


class TestObjects:
    def test_a_function(self):
        def every_second(x, grid_thw):
            return methods.uniform(x, grid_thw, ratio=0.5)

        pipeline = spec.resolve(every_second)
        assert str(pipeline) == "every_second" and pipeline.images is False and pipeline.count(GRIDS) is None
        assert pipeline(features(), GRIDS).num_out == 41

    def test_an_object_that_takes_images(self):
        class Half:
            images = True

            def __call__(self, x, grid_thw):
                return methods.uniform(x, grid_thw, ratio=0.5)

        pipeline = spec.resolve(Half())
        assert str(pipeline) == "Half" and pipeline.images is True
        both = Pipeline([Half(), Stage("uniform", {"ratio": 0.5})])
        assert str(both) == "Half+uniform:ratio=0.5,images=true"
        assert both(features(), GRIDS).lengths_out() == [16, 4]

    def test_stage_and_pipeline_pass(self):
        pipeline = spec.parse("uniform:k=3")
        assert spec.resolve(pipeline) is pipeline
        assert str(spec.resolve(Stage("uniform", {"k": 3}))) == "uniform:k=3"

    def test_grid_stage_after_an_object(self):
        with pytest.raises(SpecError, match="expected prunevid before halve"):

            def halve(x, grid_thw):
                return methods.uniform(x, grid_thw, ratio=0.5)

            Pipeline([halve, Stage("prunevid")])

    def test_what_it_returns_is_checked(self):
        with pytest.raises(TypeError, match=r"expected wrong to return a vidtok\.Plan, got int"):

            def wrong(x, grid_thw):
                return 3

            spec.resolve(wrong)(features(), GRIDS)
        with pytest.raises(ValueError, match="expected short to return a plan over 82 tokens of 2 videos"):

            def short(x, grid_thw):
                return Plan.identity([10])

            spec.resolve(short)(features(), GRIDS)


WORDS = [*methods.METHODS, *sorted({k for m in methods.METHODS.values() for k in m.kinds}), "images", "true", "false"]
PIECES = st.one_of(st.sampled_from([*WORDS, *"+:,=[]() .-", "0.5", "3", "1e-3", "(8,-1)"]), st.text(max_size=3))


def parses_or_refuses(text: str) -> None:
    try:
        pipeline = spec.parse(text)
    except SpecError as error:
        assert "\n" not in str(error) or "\n" in text
        return
    canonical = str(pipeline)
    again = spec.parse(canonical)
    assert str(again) == canonical and again.images == pipeline.images
    assert [s.options for s in again.stages] == [
        {k: v for k, v in s.options.items() if v != s.method.defaults.get(k, ...)} for s in pipeline.stages
    ]


@given(st.text(max_size=40))
@example("uniform:k=" + "9" * 5000)
@example("uniform:k=\n3")
@example("uniform:k=3\x00")
def test_any_text(text):
    parses_or_refuses(text)


@given(st.lists(PIECES, max_size=14).map("".join))
def test_nearly_a_spec(text):
    parses_or_refuses(text)


def _value(kind: str):
    number = st.floats(allow_nan=False, allow_infinity=False)
    return {
        "int": st.integers(0, 2**40),
        "float": st.one_of(st.floats(0, 1), number),
        "bool": st.booleans(),
        "word": st.sampled_from(["groups", "features"]),
        "pair": st.tuples(st.integers(1, 99), st.integers(1, 99)),
        "schedule": st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1)),
    }[kind]


@given(st.data())
def test_any_options_round_trip(data):
    name = data.draw(st.sampled_from(list(methods.METHODS)))
    kinds = methods.METHODS[name].kinds
    keys = data.draw(st.lists(st.sampled_from(list(kinds)), unique=True))
    options = {key: data.draw(_value(kinds[key])) for key in keys}
    images = data.draw(st.sampled_from([None, True, False]))
    try:
        stage = Stage(name, options, images)
    except SpecError:
        return
    pipeline = spec.parse(str(stage))
    kept = {k: v for k, v in stage.options.items() if v != stage.method.defaults.get(k, ...)}
    assert pipeline.stages[0].options == kept and pipeline.images == bool(images)
