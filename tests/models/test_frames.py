"""Videos that come as dense tensors or as images: which tokens are theirs, in every way that a model is called."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from tests.models import tiny
from tests.models.zoo import _common
from vidtok.models import attach, families
from vidtok.models.families._base import Media
from vidtok.models.families._runs import frame_units
from vidtok.plan import Plan

NEW = pytest.mark.skipif(tiny.VERSION < (5, 23), reason="families of transformers 5.23")
DENSE = ["llava_onevision", "llava_next_video", "video_llava"] + (["perception_lm"] if tiny.VERSION >= (5, 23) else [])
FRAMES = ["internvl"] + (["gemma3", "gemma3n"] if tiny.VERSION >= (5, 17) else [])
LATER = ["gemma4", "gemma4_unified", "nemotron_h_omni"] if tiny.VERSION >= (5, 23) else []
ALL = DENSE + FRAMES + LATER


def family(name):
    """The zoo's module of a family."""
    return importlib.import_module(f"tests.models.zoo.{name}")


def first(features, grid_thw):
    """Keep the first token of each video."""
    sizes = grid_thw.prod(-1)
    cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    return Plan.gather(cu[:-1].long(), cu, torch.arange(len(sizes) + 1, dtype=torch.int32), features.shape[0])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_forward_and_generate_find_the_same(name):
    module = family(name)
    model, inputs = module.make(), module.batch(module.ROWS)
    grids = []

    def see(features, grid_thw):
        grids.append((features, grid_thw))
        return tiny.keep_all(features, grid_thw)

    with attach(model, visual=see):
        model(**inputs)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert torch.equal(grids[0][1], grids[1][1]) and torch.equal(grids[0][0], grids[1][0])
    frames = [count for clips in module.ROWS for _, count, _ in clips]
    assert grids[0][1][:, 0].tolist() == frames


# Before 5.23 generate repeats frames one by one, so that the beams of a row see frames of other rows.
@pytest.mark.parametrize("name", ALL if tiny.VERSION >= (5, 23) else DENSE)
@torch.no_grad()
def test_beams(name):
    module = family(name)
    model, inputs = module.make(), module.batch(module.ROWS)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3}
    with attach(model, visual=tiny.drop):
        assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


@torch.no_grad()
def test_newline_of_llava_onevision_stays():
    module = family("llava_onevision")
    model, samples = module.make(), [[("video", 4, 56)]]
    inputs = module.batch(samples)
    lengths = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: lengths.append(a[0]))
    with attach(model, visual=first) as handle:
        model(**inputs)
    hook.remove()
    assert [(s.tokens_in, s.tokens_out) for s in handle.report().samples] == [(16, 1)]
    text = int((inputs["input_ids"] != _common.VIDEO).sum())
    assert lengths[0].shape[1] == text + 2
    assert (lengths[0][0] == model.model.image_newline).all(-1).sum() == 1


@torch.no_grad()
def test_newlines_of_tiled_images_stay():
    module = family("llava_onevision")
    model, inputs = module.make(), module.batch([[("video", 4, 56)]])
    # A whole view of 4×4 tokens, and a tile of as many with a newline behind each row.
    image = torch.tensor([[_common.START] + [_common.IMAGE] * 36 + [_common.END]])
    inputs = {
        "input_ids": torch.cat([image, inputs["input_ids"]], 1),
        "pixel_values_videos": inputs["pixel_values_videos"],
        "pixel_values": tiny.frames(2, 56)[None],
        "image_sizes": torch.tensor([[56, 56]]),
    }
    lengths = []
    with attach(model, decoder="uni_1_0.0625"):
        layer = model.model.language_model.layers[1]
        hook = layer.register_forward_pre_hook(lambda m, a: lengths.append(a[0].shape[1]))
        whole = model(**inputs, use_cache=False).logits
        cached, _ = tiny.generate(model, inputs, 1)
    hook.remove()
    visual = 36 + 17
    assert lengths == [inputs["input_ids"].shape[1] - visual + 4 + 2 + 1 + 1] * 2
    torch.testing.assert_close(cached[:, 0], whole[:, -1], rtol=0, atol=2e-5)


def ids(*parts):
    """A row: a number is a word, a string a stretch of placeholders of that length."""
    return torch.tensor([[t for p in parts for t in ([_common.IMAGE] * int(p) if isinstance(p, str) else [p])]])


def grouped(row, gap=10, **options):
    """Frames and tokens of the units that the rule finds in a row."""
    columns = (row.reshape(-1) == _common.IMAGE).nonzero().squeeze(1)
    return [
        (grid, part.tolist())
        for part, grid in frame_units(gap, **options)(Media(None, "image", columns, row.shape[1], {"input_ids": row}))
    ]


class TestFrames:
    """Stretches of placeholders and the text between them."""

    LABEL = (7, 8, 9, 10)

    def frame(self, number):
        return (*self.LABEL, number, 11, "4", 12)

    def test_labels_that_count_belong_together(self):
        row = ids(5, *self.frame(20), *self.frame(21), *self.frame(22), 6)
        assert [grid for grid, _ in grouped(row)] == [(3, 2, 2)]

    def test_count_that_restarts_begins_a_video(self):
        row = ids(5, *self.frame(20), *self.frame(21), *self.frame(20), *self.frame(21), *self.frame(22))
        assert [grid for grid, _ in grouped(row)] == [(2, 2, 2), (3, 2, 2)]

    def test_frames_without_numbers_do_not_restart(self):
        row = ids(5, *self.frame(20), *self.frame(20), *self.frame(20))
        assert [grid for grid, _ in grouped(row)] == [(3, 2, 2)]

    def test_long_text_and_other_sizes_separate(self):
        words = range(20, 31)
        assert [grid for grid, _ in grouped(ids(5, "4", 6, "4", *words, "4", 6, "4"))] == [(2, 2, 2), (2, 2, 2)]
        assert [grid for grid, _ in grouped(ids(5, "4", 6, "8", 7, "8"))] == [(1, 2, 2), (2, 1, 8)]

    def test_rows_separate(self):
        row = torch.cat([ids("4", 5, 6), ids(7, 8, "4")])
        assert [grid for grid, _ in grouped(row)] == [(1, 2, 2), (1, 2, 2)]

    @pytest.mark.parametrize("marks", [(31, 32, 33, 34, 35), (31, 32, 33, 33, 34)])
    def test_tiles_of_an_image_are_no_frames(self, marks):
        """Each behind a mark of its own, or with one token between two."""
        tiles = ids(5, *(x for mark in marks for x in ((30, mark, "4") if len(set(marks)) == 5 else (mark, "4"))), 6)
        assert [grid for grid, _ in grouped(tiles, marked=True)] == [(1, 2, 2)] * 5
        assert [grid for grid, _ in grouped(tiles)] != [(1, 2, 2)] * 5
        frames = ids(5, *(x for k in range(3) for x in (20 + k, 31, "4", 32)), 6)
        assert [grid for grid, _ in grouped(frames, marked=True)] == [(3, 2, 2)]

    @torch.no_grad()
    def test_rows_of_an_image_are_no_frames(self):
        """Mistral 3 puts a break after each row of an image."""
        module = family("mistral3")
        model = module.make()

        def inputs(frames):
            """An image or more of 2 rows of 3 tokens."""
            row = torch.tensor([[5, 6, *[*[_common.IMAGE] * 3, 30, *[_common.IMAGE] * 3, 31] * frames, 7, 8, 9]])
            return {
                "input_ids": row, "attention_mask": torch.ones_like(row),
                "pixel_values": tiny.frames(frames, 84)[:, :, :56], "image_sizes": torch.tensor([[56, 84]] * frames),
            }  # fmt: skip

        with attach(model, visual=first) as handle:
            for run in (lambda **x: model(**x), lambda **x: model.generate(**x, max_new_tokens=2, do_sample=False)):
                run(**inputs(1))
                assert not handle.report().samples
                run(**inputs(3))
                assert [s.grid_thw for s in handle.report().samples] == [(3, 2, 3)]

    @torch.no_grad()
    def test_single_images_stay(self):
        module = family("internvl")
        model, inputs = module.make(), module.batch([[("video", 1, 56)]])
        with attach(model, visual=first) as handle:
            model(**inputs)
        assert not handle.report().samples


@NEW
class TestMasks:
    """What goes wrong without the remaking of masks."""

    def spread(self, name):
        module = family(name)
        model, inputs = module.make(), module.batch(module.ROWS)
        with attach(model, visual=tiny.drop):
            got, out = tiny.generate(model, inputs, 3)
            row = module.row(inputs, module.ROWS, 1)
            alone, _ = tiny.generate(model, row, 3)
        return (got[1] - alone[0]).abs().max().item(), out.sequences[1, -3:]

    @pytest.mark.parametrize("name", ["gemma3", "gemma4"])
    def test_windows_count_the_tokens_that_are_left(self, name, monkeypatch):
        assert self.spread(name)[0] < 2e-5
        module = family(name)
        model, inputs = module.make(), module.batch(module.ROWS)
        with torch.no_grad(), attach(model, visual=tiny.drop):
            right = model(**inputs, use_cache=False).logits[:, -1]
        known = families.FAMILIES[name]
        monkeypatch.setitem(families.FAMILIES, name, dataclasses.replace(known, masks=None))
        with torch.no_grad(), attach(model, visual=tiny.drop):
            cut = model(**inputs, use_cache=False).logits[:, -1]
        assert (cut - right).abs().max() > 1e-4

    @pytest.mark.parametrize("name", ["gemma3", *LATER[:2]])
    def test_layers_of_full_attention_see_what_they_saw(self, name, monkeypatch):
        """Their mask is that of the whole row without what was dropped, both ways where the model has it so."""
        module = family(name)
        model, inputs, seen = module.make("eager"), module.batch(module.ROWS[1:2]), []

        def keep(module, args, kwargs):
            seen.append((kwargs["inputs_embeds"], kwargs["attention_mask"]["full_attention"]))

        def equal():
            seen.clear()
            language = model.model.language_model
            with torch.no_grad():
                with language.register_forward_pre_hook(keep, with_kwargs=True):
                    model(**inputs, use_cache=False)
                with attach(model, visual=tiny.drop), language.register_forward_pre_hook(keep, with_kwargs=True):
                    model(**inputs, use_cache=False)
            (whole, before), (left, after) = seen
            kept, at = [], 0
            for x in left[0]:  # in order, since text tokens come again
                at += int((whole[0, at:] == x).all(-1).int().argmax())
                kept.append(at)
                at += 1
            assert len(kept) < whole.shape[1]
            return torch.equal(before[:, :, kept][..., kept], after)

        assert equal()
        if name == "gemma4_unified":  # whose own masks are not those that it has made for static caches
            known = families.FAMILIES["gemma4"]
            mine = families.FAMILIES[name]
            monkeypatch.setitem(families.FAMILIES, name, dataclasses.replace(mine, masks=known.masks))
            assert not equal()

    def second_turn(self, name):
        module = family(name)
        samples = [[("video", 2, 56)], [("video", 2, 56)]]
        model, inputs = module.make(), module.batch(samples)
        one, two = (module.row(inputs, samples, i) for i in range(2))
        both = {k: torch.cat([one[k], two[k]], int(k in _common.PER_TOKEN)) for k in one}
        with torch.no_grad(), attach(model, visual=tiny.drop):
            held = model(**one, use_cache=True).past_key_values
            later = {**two, **{k: v for k, v in both.items() if k.endswith(("attention_mask", "type_ids"))}}
            got = model(**later, past_key_values=held).logits[:, -1]
            return (got - model(**both, use_cache=False).logits[:, -1]).abs().max().item()

    @pytest.mark.parametrize("name", ["gemma3", *LATER[:2]])
    def test_second_video(self, name, monkeypatch):
        assert self.second_turn(name) < 2e-5
        known = families.FAMILIES[name]

        def early(base, arguments, types):
            past = arguments["attention_mask"].shape[1] - arguments["inputs_embeds"].shape[1]
            return known.masks(base, arguments, types[:, past:])

        monkeypatch.setitem(families.FAMILIES, name, dataclasses.replace(known, masks=early))
        assert self.second_turn(name) > 1e-4


@NEW
@torch.no_grad()
def test_video_path_of_nemotron_h_omni_fails_without_attachment():
    model = family("nemotron_h_omni").make()
    ids = torch.tensor([[5, *[_common.IMAGE] * 4, 6]])
    with pytest.raises(TypeError, match="must be tuple of Tensors"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(2, 3, 56, 56))


def test_older_transformers_are_named(monkeypatch):
    name = "llava_onevision"
    known = dataclasses.replace(families.FAMILIES[name], since=(99, 0))
    monkeypatch.setitem(families.FAMILIES, name, known)
    with pytest.raises(ValueError, match=r"expected transformers 99\.0 or later for LlavaOnevisionModel"):
        attach(family(name).make(), visual=tiny.drop)
