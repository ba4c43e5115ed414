"""Samples packed into one row: reduced and trained as if each were alone."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import pytest
import torch

import vidtok
from tests.models import flash, plain, tiny
from tests.models.test_zoo import TAKEN, family, far
from vidtok.models import families
from vidtok.models.packed import Packed
from vidtok.models.transv import TransV

SAME = 2e-5
CHOSEN = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "qwen2")
HOOKS = ("visual", "uni", "attn", "both")
FORMS = [(a, f) for a in ("sdpa", "flash_attention_2") for f in ("positions", "lengths")] + [("eager", "positions")]
RECURRENT = "expected padded rows for .*, which has recurrent layers"
MASKS = "expected padded rows for .*, whose masks do not part samples"
#: Families that do not keep packed samples apart, and what is said then.
REFUSED = {
    **dict.fromkeys(("gemma3", "gemma4", "gemma4_unified", "molmo2"), MASKS),
    **dict.fromkeys(("glm5_next", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), RECURRENT),
    **dict.fromkeys(("nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), RECURRENT),
}
#: Vision towers of transformers 5.17 take the lengths of the language model's samples for their own.
LENGTHS_CLASH = tiny.VERSION == (5, 17)
#: Where the unreduced model takes no row of the text's among M-RoPE positions.
THREE_ROWS = {(4, 57): ("glm4v", "glm4v_moe"), (5, 17): ("cosmos3_edge",)}
EXTRA = {"use_cache": False}


@lru_cache(maxsize=4)
def made(name, attention="sdpa"):
    """Model of a family."""
    with flash.installed():
        return plain.make(name, attention) if name == "qwen2" else family(name).make(attention, layers=3)


@lru_cache(maxsize=8)
def fed(name):
    """The samples, each alone, and the row that holds all."""
    if name == "qwen2":
        rows = [{"input_ids": torch.tensor([row])} for row in plain.rows([[24], [12, 9], [17]])]
        return rows, pack(name, rows, {})
    module = family(name)
    inputs = module.batch(module.ROWS)
    rows = [module.row(inputs, module.ROWS, i) for i in range(len(module.ROWS))]
    shape = inputs["input_ids"].shape
    return rows, pack(name, rows, {k: v for k, v in inputs.items() if v.shape[:2] != shape})


def pack(name, rows, pixels):
    """Rows behind one another, with the positions that each has alone."""
    row = dict(pixels)
    for key, value in rows[0].items():
        if key not in pixels and key != "attention_mask":
            row[key] = torch.cat([r[key] for r in rows], 1) if value.dim() > 1 else value
    text = torch.cat([torch.arange(r["input_ids"].shape[1]) for r in rows])[None]
    seen = [positions(name, r) for r in rows]
    if seen[0] is not None and seen[0].dim() == 3:
        text = torch.cat([text[None], torch.cat([p[-3:] for p in seen], -1)])
    return {**row, "position_ids": text}


def positions(name, row):
    """What the language model is given for a row alone."""
    model, seen = made(name), []
    if name == "qwen2":
        return None
    module = families.locate(model).language_model
    hook = module.register_forward_pre_hook(lambda m, a, k: seen.append(k.get("position_ids")), with_kwargs=True)
    with torch.no_grad():
        model(**row, **EXTRA)
    hook.remove()
    return seen[0]


def lengths(rows):
    """What ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` adds."""
    sizes = [r["input_ids"].shape[1] for r in rows]
    borders = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return {
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": max(sizes), "max_length_k": max(sizes),
    }  # fmt: skip


def answers(row):
    """Labels: the last three tokens of a sample."""
    labels = torch.full_like(row["input_ids"], -100)
    labels[:, -3:] = row["input_ids"][:, -3:]
    return labels


def run(model, handle, row, labels=None):
    """Output of a row; tokens are named where the model is given no pixels."""
    named = handle is not None and not any(k.startswith("pixel_values") for k in row)
    with handle.tokens(plain.visual(row["input_ids"])) if named else nullcontext():
        return model(**row, labels=None if labels is None else labels.clone(), **EXTRA)


def hooked(model, name, hook):
    """The attachment of a hook."""
    at = 1 if name == "qwen2" else getattr(family(name), "DROP_AT", 1)
    inside = {"visual": None, "uni": f"uni_{at}_0.5", "attn": f"attn_{at}_0.5", "both": f"attn_{at}_0.5"}[hook]
    return vidtok.attach(model, visual=tiny.drop if hook in ("visual", "both") else None, decoder=inside)


def compare(name, attention, hook, form="positions"):
    """Largest differences of logits and loss, and how far the reduction is from none."""
    rows, row = fed(name)
    row = {**row, **lengths(rows)} if form == "lengths" else row
    labels = torch.cat([answers(r) for r in rows], 1)
    with flash.installed(), torch.no_grad():
        model = made(name, attention)
        whole = run(model, None, row, labels)
        with hooked(model, name, hook) if hook else nullcontext() as handle:
            got = run(model, handle, row, labels)
            alone = [run(model, handle, r, answers(r)) for r in rows]
    want = torch.cat([out.logits for out in alone], 1)
    assert got.logits.shape == want.shape
    scale = want.abs().max().item()
    loss = abs(got.loss - sum(out.loss for out in alone) / len(alone)).item()
    changed = got.logits.shape != whole.logits.shape and abs(got.loss - whole.loss).item()
    return far(got.logits, want) / scale, loss, changed


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("attention", "form"), FORMS)
@pytest.mark.parametrize("name", CHOSEN)
def test_samples_equal_each_alone(name, attention, form, hook):
    if name == "qwen2" and hook in ("visual", "both"):
        return
    if LENGTHS_CLASH and attention != "sdpa" and form == "lengths" and name in ("qwen2_5_vl", "qwen3_vl"):
        with pytest.raises(TypeError, match="multiple values for keyword argument 'cu_seq_lens_q'"):
            compare(name, attention, None, form)
        return
    difference, loss, changed = compare(name, attention, hook, form)
    assert difference < SAME
    assert loss < SAME
    assert changed > 1e-4


@pytest.mark.parametrize("name", [n for n in TAKEN if n not in CHOSEN])
def test_every_family(name):
    """Reduced before and inside the decoder, or refused."""
    if name in THREE_ROWS.get(tiny.VERSION, ()):
        with pytest.raises(RuntimeError, match=r"expand|must match the size"):
            compare(name, "sdpa", None)
        return
    hook = "both" if "attn" not in getattr(family(name), "REFUSED", {}) else "visual"
    if name not in REFUSED:
        difference, loss, changed = compare(name, "sdpa", hook)
        assert difference < SAME and loss < SAME and changed > 1e-6
        return
    _, row = fed(name)
    model = made(name)
    for which in ("visual", "uni"):
        if which in getattr(family(name), "REFUSED", {}):
            continue
        with hooked(model, name, which) as handle, pytest.raises(ValueError, match=REFUSED[name]):
            run(model, handle, row)


@pytest.mark.parametrize("name", [n for n in ("cohere_compass",) if n in TAKEN and not LENGTHS_CLASH])
def test_layers_without_positions_need_lengths(name):
    """Such layers, with flash attention, part samples by cu_seq_lens only."""
    assert compare(name, "flash_attention_2", "visual", "lengths")[0] < SAME
    assert compare(name, "flash_attention_2", None)[0] > 1e-2
    with pytest.raises(ValueError, match="expected cu_seq_lens and max_length with the flash attention of"):
        compare(name, "flash_attention_2", "visual")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
def test_renumbered(name, hook):
    rows, row = fed(name)
    model = made(name)
    method = tiny.drop if hook in ("visual", "both") else None
    inside = None if hook == "visual" else f"{'uni' if hook == 'uni' else 'attn'}_2_0.5"
    with torch.no_grad(), vidtok.attach(model, visual=method, decoder=inside, position="renumber") as handle:
        want = torch.cat([run(model, handle, r, answers(r)).logits for r in rows], 1)
        got = run(model, handle, row, torch.cat([answers(r) for r in rows], 1)).logits
    assert far(got, want) < SAME * want.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("hook", HOOKS)
def test_without_restarts_samples_see_each_other(name, attention, hook, monkeypatch):
    """What the tests above would look like if borders were lost."""
    monkeypatch.setattr(Packed, "number", lambda self: torch.arange(self.sample.shape[1])[None])
    assert compare(name, attention, hook)[0] > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2"])
def test_samples_that_ask_together_differ(name, monkeypatch):
    """Scores and budgets of the whole row are others."""
    monkeypatch.setattr(Packed, "parts", lambda self: [slice(0, self.sample.shape[1])])
    assert compare(name, "sdpa", "attn")[0] > 1e-3


def test_kept_all_is_untouched():
    _, row = fed("qwen2_5_vl")
    model = made("qwen2_5_vl")
    labels = row["input_ids"].clone()
    with torch.no_grad():
        before = run(model, None, row, labels)
        with vidtok.attach(model, visual=tiny.keep_all) as handle:
            after = run(model, handle, row, labels)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("hook", ["visual", "uni"])
def test_first_tokens_are_not_learnt_from_another_sample(hook):
    rows, row = fed("qwen2_5_vl")
    model = made("qwen2_5_vl")

    def every(r):
        return r["input_ids"].masked_fill(r["input_ids"] == tiny.VIDEO, -100)

    labels = every(row)
    kept = labels.clone()
    with torch.no_grad(), hooked(model, "qwen2_5_vl", hook) as handle:
        got = model(**row, labels=labels, **EXTRA).loss
        total, count = 0.0, 0
        for r in rows:
            n = int((every(r)[:, 1:] != -100).sum())
            total, count = total + run(model, handle, r, every(r)).loss * n, count + n
    assert torch.equal(labels, kept)
    assert abs(got - total / count) < SAME
    with torch.no_grad():
        whole = run(model, None, row, labels).loss
        alone = sum(run(model, None, r, every(r)).loss * int((every(r)[:, 1:] != -100).sum()) for r in rows) / count
    assert abs(whole - alone) > 1e-3


def test_lengths_are_counted_again():
    """Before the layers and behind each drop, in the type in which they came."""
    rows, row = fed("qwen3_vl")
    given = {**lengths(rows), "max_length_q": torch.tensor(999), "seq_idx": torch.zeros_like(row["input_ids"])}
    model, seen = made("qwen3_vl"), []
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids")
    with torch.no_grad(), vidtok.attach(model, visual=tiny.drop, decoder="uni_2_0.5") as handle:
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append({n: k[n] for n in names}), with_kwargs=True)
            for layer in model.model.language_model.layers
        ]
        run(model, handle, {**row, **given})
        for hook in hooks:
            hook.remove()
    whole = [r["input_ids"].shape[1] for r in rows]
    sizes = []
    for at in seen:
        borders = at["cu_seq_lens_q"]
        sizes.append(borders.diff().tolist())
        assert borders.dtype == torch.int32 and torch.equal(borders, at["cu_seq_lens_k"])
        assert isinstance(at["max_length_q"], torch.Tensor) and isinstance(at["max_length_k"], int)
        assert int(at["max_length_q"]) == at["max_length_k"] == max(sizes[-1])
        assert at["position_ids"][0].tolist() == [i for n in sizes[-1] for i in range(n)]
        assert at["seq_idx"].shape == at["position_ids"].shape
    assert sizes[0] == sizes[1] and all(c < b < a for a, b, c in zip(whole, sizes[1], sizes[2]))


def test_lengths_alone_are_enough_for_flash_attention():
    """M-RoPE positions of three rows, and none at all of one row."""
    for name in ("qwen2",) if LENGTHS_CLASH else ("qwen2_5_vl", "qwen2"):
        rows, row = fed(name)
        bare = {**row, **lengths(rows)}
        position = bare.pop("position_ids")
        if position.dim() == 3:
            bare["position_ids"] = position[1:]
        labels = torch.cat([answers(r) for r in rows], 1)
        hook = "both" if name == "qwen2_5_vl" else "attn"
        with flash.installed(), torch.no_grad():
            model = made(name, "flash_attention_2")
            with hooked(model, name, hook) as handle:
                got = run(model, handle, bare, labels).logits
                want = torch.cat([run(model, handle, r, answers(r)).logits for r in rows], 1)
        assert far(got, want) < SAME * want.abs().max()
        with hooked(made(name), name, hook) as handle, pytest.raises(ValueError, match="attention does not read"):
            run(made(name), handle, bare)


@pytest.mark.parametrize("answered", [False, True])
def test_transv(answered):
    """What leaves a sample is read by that sample."""
    rows, row = fed("qwen2_5_vl")
    model, spec = made("qwen2_5_vl"), "uni_1_0.6-attn_2_0.3"
    transv = TransV(model.model.language_model, spec, init="attention", answers=answered)
    with torch.no_grad():
        for stage in transv.stages:
            stage.alpha.fill_(0.5)
        with vidtok.attach(model, visual=tiny.merge, decoder=vidtok.Drop(spec, merge=transv)) as handle:
            got = run(model, handle, row, torch.cat([answers(r) for r in rows], 1)).logits
            want = torch.cat([run(model, handle, r, answers(r)).logits for r in rows], 1)
        with vidtok.attach(model, visual=tiny.merge, decoder=spec) as handle:
            without = run(model, handle, row, torch.cat([answers(r) for r in rows], 1)).logits
    assert far(got, want) < SAME * want.abs().max() < far(got, without)


def gradients(model, row, labels):
    model.zero_grad()
    loss = model(**row, labels=labels.clone(), **EXTRA).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_gradients_and_checkpointing(name):
    """Those of the samples alone, also when layers are computed again."""
    rows, row = fed(name)
    model = made(name)
    model.train()
    try:
        with hooked(model, name, "both"):
            loss, got = gradients(model, row, torch.cat([answers(r) for r in rows], 1))
            alone = [gradients(model, r, answers(r)) for r in rows]
            assert abs(loss - sum(one[0] for one in alone) / len(rows)) < SAME
            scale = max(g.abs().max() for g in got.values())
            assert any("language_model" in n for n in got) and any("vis" in n for n in got)
            for n, g in got.items():
                assert far(g, sum(one[1][n] for one in alone) / len(rows)) < 1e-4 * scale, n
            for reentrant in (False, True):
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                again, checked = gradients(model, row, torch.cat([answers(r) for r in rows], 1))
                model.gradient_checkpointing_disable()
                assert abs(loss - again) < 1e-6
                assert max(far(checked[n], g) for n, g in got.items()) < 1e-5 * scale
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("hook", ["visual", "uni"])
def test_refused(hook):
    rows, row = fed("qwen2_5_vl")
    model, sizes = made("qwen2_5_vl"), lengths(rows)
    position, length = row["position_ids"], row["input_ids"].shape[1]

    def moved(by):
        text = position.clone()
        text[0] += by
        return {"position_ids": text}

    first = rows[0]["input_ids"].shape[1]
    video = int((row["input_ids"][0] == tiny.VIDEO).nonzero()[4])
    broken = position.clone()
    broken[0, 0, video:first] -= broken[0, 0, video].item()
    for change, words in (
        ({"use_cache": True}, "expected use_cache=False with packed samples"),
        (moved(1), "expected position_ids that count from 0 in each packed sample"),
        ({"position_ids": broken}, "expected visual tokens that end within their packed sample"),
        ({**sizes, "cu_seq_lens_k": sizes["cu_seq_lens_k"] - 1}, f"expected cu_seq_lens from 0 to the {length} tokens"),
        ({**sizes, **{n: torch.tensor([0, 5, length]) for n in ("cu_seq_lens_q", "cu_seq_lens_k")}}, "restart at cu"),
        ({**sizes, "position_ids": position[1:]}, "got cu_seq_lens that attention does not read"),
        ({**sizes, "attention_mask": torch.ones(1, length).long()}, "expected cu_seq_lens without attention_mask"),
    ):
        with hooked(model, "qwen2_5_vl", hook), pytest.raises(ValueError, match=words):
            model(**{**row, **EXTRA, **change})


def test_rows_of_a_batch_are_refused():
    _, row = fed("qwen2")
    double = {k: v.expand(2, -1) for k, v in row.items()}
    refused = pytest.raises(ValueError, match="expected one row of packed samples, got 2 rows")
    with hooked(made("qwen2"), "qwen2", "uni") as handle, refused:
        run(made("qwen2"), handle, double)


def test_frames_of_neighbours_are_not_one_video():
    """Two short samples whose frames come as images, with fewer tokens between them than frames may have."""
    module = family("internvl")
    inputs = module.batch([[("video", 2, 56)], [("video", 2, 56)]])
    rows = [module.row(inputs, [[("video", 2, 56)]] * 2, i) for i in range(2)]
    for r in rows:  # no text behind the last frame
        stop = int((r["input_ids"][0] == 250).nonzero()[-1]) + 3
        for key in ("input_ids", "attention_mask"):
            r[key] = r[key][:, :stop]
    row = {"pixel_values": inputs["pixel_values"], "input_ids": torch.cat([r["input_ids"] for r in rows], 1)}
    text = torch.cat([torch.arange(r["input_ids"].shape[1]) for r in rows])[None]
    model = made("internvl")
    with torch.no_grad(), vidtok.attach(model, visual=tiny.drop) as handle:
        got = run(model, handle, {**row, "position_ids": text}).logits
        assert [s.tokens_in for s in handle.report().samples] == [8, 8]
        want = torch.cat([run(model, handle, r).logits for r in rows], 1)
        run(model, handle, row)
        assert [s.tokens_in for s in handle.report().samples] == [16]
    assert far(got, want) < SAME * want.abs().max()


def test_counts():
    """Positions restart at each sample; empty samples do no harm."""
    packed = Packed.of([0, 3, 3, 5], torch.device("cpu"))
    assert packed.number().tolist() == [[0, 1, 2, 0, 1]]
    assert packed.parts() == [slice(0, 3), slice(3, 5)]
    assert packed.length("max_length_q", 9) == 3
    assert packed.length("cu_seq_lens_q", torch.zeros(1, dtype=torch.int32)).tolist() == [0, 3, 3, 5]
    labels = torch.arange(5)[None]
    packed.part(labels)
    assert labels.tolist() == [[-100, 1, 2, -100, 4]]
