"""An unknown transformers, or a forward that someone replaced, is told apart from what was tested."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers

import vidtok
from tests.models import tiny
from vidtok.models import families, versions

ROOT = Path(__file__).parents[2]
RANGE = "4.57.6, 5.17.0, 5.23.0"


@pytest.fixture
def places(models):
    return families.locate(models("qwen2_5_vl"))


@pytest.fixture
def pretend(monkeypatch):
    """Another version of transformers, with these functions changed in the record."""

    def to(version, *changed, gone=()):
        monkeypatch.setattr(versions, "installed", lambda: version)
        table = {v: dict(r) for v, r in versions.records().items()}
        for record in table.values():
            record.update(dict.fromkeys(changed, "0" * 12))
            record.update(dict.fromkeys(gone, "0" * 12))
        monkeypatch.setattr(versions, "records", lambda: table)

    return to


# ---------------------------------------------------------------------- fingerprints
def test_layout_and_words_do_not_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "plain": "def f(x, y=1):\n    z = x + y\n    return z\n",
        "dressed": 'def f(x: int, y: int = 1) -> int:\n    "Doc."\n    z: int = (x\n      + y)  # why\n    return z\n',
        "other": "def f(x, y=1):\n    z = x - y\n    return z\n",
        "default": "def f(x, y=2):\n    z = x + y\n    return z\n",
        "wrapped": "import torch\n@torch.no_grad()\ndef f(x, y=1):\n    z = x + y\n    return z\n",
    }
    got = {}
    for name, text in texts.items():
        (tmp_path / f"fp_{name}.py").write_text(text)
        got[name] = versions.fingerprint(__import__(f"fp_{name}").f)
    assert got["plain"] == got["dressed"]
    assert len({*got.values()}) == 4
    assert versions.fingerprint(len) is None


def test_the_record_is_of_the_installed_version():
    command = [sys.executable, str(ROOT / "scripts/fingerprints")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_record_names_what_models_rely_on(places):
    found, replaced = versions.relied(places)
    assert not replaced
    record = versions.records()[transformers.__version__]
    assert {n: record.get(n) for n in found} == found
    stems = {name.rsplit(".", 2)[-2] for name in found if name.endswith(".forward")}
    assert stems == {
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel", "Qwen2_5_VLTextModel", "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLAttention", "Qwen2_5_VLRotaryEmbedding",
    }  # fmt: skip


def test_the_record_has_every_version():
    table = json.loads(Path(versions.__file__).with_name("fingerprints.json").read_text(encoding="utf-8"))
    assert all(len(row) == len(versions.SUPPORTED) and any(row) for row in table.values())
    for name in families.CORE:
        family = families.FAMILIES[name]
        assert all(table[f"{name}.{cls}.forward"] for cls in (family.base, *family.heads))
        assert None not in table[f"{name}.{family.base}.forward"]


# ---------------------------------------------------------------------- versions
def test_supported_versions_pass(models):
    for kind in tiny.KINDS:
        versions.check(families.locate(models(kind)))
        versions.check(families.locate(models(kind).model))


def test_an_unknown_version_with_the_same_forwards_passes(places, pretend):
    pretend("6.1.0")
    versions.check(places)


def test_an_unknown_version_with_another_forward_is_refused(places, pretend):
    pretend("6.1.0", "qwen2_5_vl.Qwen2_5_VLModel.forward", "cache_utils.DynamicLayer", gone=["masking_utils.gone"])
    with pytest.raises(ValueError, match=RANGE) as error:
        versions.check(places)
    text = str(error.value)
    assert "6.1.0" in text and "qwen2_5_vl.Qwen2_5_VLModel.forward changed" in text and "\n" not in text
    assert "cache_utils.DynamicLayer changed" in text and text.count(". ") == 0


def test_an_edited_file_of_a_supported_version_is_refused(places, pretend):
    pretend(transformers.__version__, "qwen2_5_vl.Qwen2_5_VLTextModel.forward")
    with pytest.raises(ValueError, match=r"Qwen2_5_VLTextModel.forward changed"):
        versions.check(places)


def test_an_untested_version_can_be_let_through(places, pretend, monkeypatch):
    pretend("6.1.0", "qwen2_5_vl.Qwen2_5_VLModel.forward")
    monkeypatch.setenv("VIDTOK_UNTESTED_TRANSFORMERS", "1")
    with pytest.warns(UserWarning, match="VIDTOK_UNTESTED_TRANSFORMERS"):
        versions.check(places)


# ---------------------------------------------------------------------- replaced forwards
def replacements(original):
    def plain(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    @functools.wraps(original)
    def disguised(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return {"plain": plain, "disguised": disguised}


@pytest.mark.parametrize("how", ["plain", "disguised"])
@pytest.mark.parametrize("what", ["outer", "base", "language_model", "layer", "attention"])
def test_replaced_forwards_of_classes_are_refused(models, places, monkeypatch, what, how):
    layer = places.language_model.layers[0]
    module = {"layer": layer, "attention": layer.self_attn}.get(what) or getattr(places, what)
    cls = type(module)
    versions.check(places)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", replacements(cls.forward)[how])
        with pytest.raises(ValueError, match=rf"{cls.__name__}.forward replaced") as error:
            versions.check(places)
        assert RANGE in str(error.value) and "\n" not in str(error.value)
    versions.check(places)


def test_attach_refuses_and_leaves_the_model_alone(models, monkeypatch):
    model, inputs = models("qwen2_5_vl"), tiny.batch("qwen2_5_vl", tiny.ROWS[:1])
    right = model(**inputs).logits
    cls = type(model.model.language_model)
    monkeypatch.setattr(cls, "forward", replacements(cls.forward)["disguised"])
    for spec in ({"visual": tiny.drop}, {"decoder": "uni_1_0.5"}):
        with pytest.raises(ValueError, match=rf"{cls.__name__}.forward replaced"):
            vidtok.attach(model, **spec)
    assert torch.equal(model(**inputs).logits, right)
    monkeypatch.setenv("VIDTOK_UNTESTED_TRANSFORMERS", "1")
    with pytest.warns(UserWarning, match="replaced"), vidtok.attach(model, visual=tiny.drop):
        assert model(**inputs).logits.shape[1] < right.shape[1]


def test_replaced_masks_are_refused(places, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "create_causal_mask", replacements(masking_utils.create_causal_mask)["plain"])
    with pytest.raises(ValueError, match="create_causal_mask replaced"):
        versions.check(places)


def test_replaced_forwards_of_one_module_are_refused(places, monkeypatch):
    layer = places.language_model.layers[1]
    monkeypatch.setitem(vars(layer), "forward", types.MethodType(replacements(type(layer).forward)["plain"], layer))
    with pytest.raises(ValueError, match="the forward of one Qwen2_5_VLDecoderLayer replaced"):
        versions.check(places)


def test_what_accelerate_puts_in_is_taken(models):
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny.make("qwen2_5_vl", layers=1)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    hooks.add_hook_to_module(model.model.language_model.layers[0], hooks.AlignDevicesHook(io_same_device=True))
    versions.check(families.locate(model))


def test_subclasses_are_taken_unless_they_bring_a_forward(models, places, monkeypatch):
    model = models("qwen2_5_vl")
    before = type(model)
    monkeypatch.setattr(model, "__class__", type("Mine", (before,), {}))
    versions.check(families.locate(model))
    monkeypatch.setattr(model, "__class__", type("Mine", (before,), {"forward": replacements(before.forward)["plain"]}))
    with pytest.raises(ValueError, match=r"Mine.forward replaced"):
        versions.check(families.locate(model))


def test_later_checks_are_quick(places):
    versions.check(places)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        versions.check(places)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005
