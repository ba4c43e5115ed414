"""Token reduction in the Trainer and in plain loops: losses fall, gradients are right, the model is left as it was."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

import vidtok
from tests.models import tiny
from vidtok.training import TokenReduction

KIND = "qwen2_5_vl"
CHECKPOINTING = {"plain": None, "reentrant": True, "not reentrant": False}
ROWS: list[list[tiny.Clip]] = [[("video", 8, 56)], [("video", 4, 56)]]


def labelled(rows=tiny.ROWS, side="left"):
    """A batch whose last four tokens of every row are learnt."""
    inputs = tiny.batch(KIND, rows, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        at = mask.nonzero().squeeze(1)[-4:]
        labels[i, at] = inputs["input_ids"][i, at]
    return inputs | {"labels": labels}


def checkpointed(model, reentrant):
    """Switch gradient checkpointing on, in the way that this version has."""
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def fresh(models):
    """A model of one's own to train, dropout and all else as in training."""
    return copy.deepcopy(models(KIND)).train()


class Rows(torch.utils.data.Dataset):
    """Each item is a whole batch."""

    def __init__(self, count=64, side="left"):
        self.inputs, self.count = labelled(ROWS, side), count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.inputs


class Fails(TrainerCallback):
    """Stops training by an exception in its second step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            raise RuntimeError("stop")


def arguments(folder, steps=6, **options):
    """Arguments of a short training."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        **{
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


def trainer(model, folder, callbacks, steps=6, data=None, **options):
    """A Trainer over the same batch again and again."""
    return Trainer(
        model,
        arguments(folder, steps, **options),
        train_dataset=data or Rows(),
        eval_dataset=Rows(2),
        data_collator=lambda items: {k: v.clone() for k, v in items[0].items()},
        callbacks=callbacks,
    )


def losses(run):
    """The logged losses."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def hooks(model):
    """Number of hooks of all modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_loss_falls_in_the_trainer(models, tmp_path, reentrant):
    model = fresh(models)
    before, keys = hooks(model), set(model.state_dict())
    options = {} if reentrant is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }  # fmt: skip
    run = trainer(model, tmp_path, [TokenReduction(visual="uniform:ratio=0.5", log=True)], **options)
    run.train()
    curve = losses(run)
    assert len(curve) == 6
    assert curve[-1] < 0.7 * curve[0]
    inputs = run.train_dataset.inputs
    visual = int((inputs["input_ids"] == tiny.VIDEO).sum())
    line = run.state.log_history[0]
    assert (line["visual_tokens_in"], line["visual_tokens_out"]) == (visual, visual // 2)
    assert line["tokens_in"] == int(inputs["attention_mask"].sum())
    assert line["tokens_out"] == line["tokens_in"] - visual // 2
    assert set(model.state_dict()) == keys
    if reentrant is None:  # else the Trainer leaves a hook of its own
        assert hooks(model) == before


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_loss_falls_in_a_plain_loop(models, reentrant):
    model, inputs = checkpointed(fresh(models), reentrant), labelled(ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    with vidtok.attach(model, visual=tiny.merge) as handle:
        for _ in range(6):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        assert sum(handle.report().tokens_out) < sum(handle.report().tokens_in)
    assert curve[-1] < 0.7 * curve[0]


def test_the_trainers_losses_are_those_of_the_plain_loop(models, tmp_path):
    """Labels, ``num_items_in_batch`` and accumulation: the same numbers as by hand."""
    model = fresh(models)
    run = trainer(
        copy.deepcopy(model), tmp_path, [TokenReduction(visual=tiny.drop)], steps=3, optim="sgd", learning_rate=1e-2,
        lr_scheduler_type="constant", max_grad_norm=0.0, gradient_accumulation_steps=2,
    )  # fmt: skip
    run.train()
    inputs = run.train_dataset.inputs
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    curve = []
    with vidtok.attach(model, visual=tiny.drop):
        for _ in range(3):
            total = 0.0
            for _ in range(2):
                loss = model(**inputs, use_cache=False).loss / 2
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(total)
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(curve), rtol=2e-4, atol=0)


# ---------------------------------------------------------------------- gradients
def by_hand(model, inputs, stay):
    """Loss of reduced rows, written without vidtok: each row alone, from embeddings through the layers.

    ``stay`` maps a layer to the columns that it still sees, bool ``[B, L]``.
    """
    base = model.model
    embeds = base.get_input_embeddings()(inputs["input_ids"])
    encoded = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    encoded = getattr(encoded, "pooler_output", encoded)
    at = (inputs["input_ids"] == tiny.VIDEO)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(at, torch.cat(list(encoded)))
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    position, _ = base.get_rope_index(**{k: inputs[k] for k in names if k in inputs})
    total, count = 0.0, 0
    for i in range(embeds.shape[0]):
        columns = inputs["attention_mask"][i].nonzero().squeeze(1)
        hidden = embeds[i, columns][None]
        rotary = base.language_model.rotary_emb(hidden, position[:, i, columns][:, None])
        for n, layer in enumerate(base.language_model.layers):
            if n in stay:
                kept = stay[n][i, columns]
                columns, hidden = columns[kept], hidden[:, kept]
                rotary = tuple(part[..., kept, :] for part in rotary)
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = model.lm_head(base.language_model.norm(hidden))[0, :-1].float()
        labels = inputs["labels"][i, columns][1:]
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def seen(report, inputs):
    """For each layer at which tokens were dropped, the columns that stay, as the report has them."""
    stay = {}
    for index in (0, *(n for n, _ in report.samples[0].stages)):
        stay[index] = inputs["input_ids"] != tiny.VIDEO
        start = [0] * len(stay[index])
        for sample in report.samples:
            columns = (inputs["input_ids"][sample.row] == tiny.VIDEO).nonzero().squeeze(1)[start[sample.row] :]
            stay[index][sample.row, columns[sample.at(index).anchor.long()]] = True
            start[sample.row] += sample.tokens_in
    return stay


def gradients(model, loss):
    """Gradients of all parameters."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def every_other(inputs):
    """The columns that are kept when every other visual token of a row goes."""
    visual = inputs["input_ids"] == tiny.VIDEO
    return ~visual | (visual.long().cumsum(1) % 2 == 1)


def by_rule(features, grid_thw):
    """The same, as a method."""
    sizes = grid_thw.prod(-1).tolist()
    start, index, kept = 0, [], []
    for n in sizes:
        index.append(start + torch.arange(0, n, 2))
        kept.append(len(index[-1]))
        start += n
    cu = [torch.tensor([0, *s]).cumsum(0).int() for s in (sizes, kept)]
    return vidtok.Plan.gather(torch.cat(index), cu[0], cu[1], start)


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_a_reduced_forward_by_hand(models, reentrant, side):
    # Even counts of tokens, so that "every other" of a row is every other of each of its videos.
    rows = [[("video", 8, 112)], [("video", 4, 56), ("video", 4, 84)], [("video", 6, 56)]]
    rows[1][1] = ("video", 4, 112)
    model, inputs = fresh(models), labelled(rows, side)
    loss = by_hand(model, inputs, {0: every_other(inputs)})
    expected = gradients(model, loss)
    checkpointed(model, reentrant)
    with vidtok.attach(model, visual=by_rule):
        mine = model(**inputs, use_cache=False).loss
        got = gradients(model, mine)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    # Without a reduction the gradients are others.
    plain = gradients(model, model(**inputs, use_cache=False).loss)
    assert max((plain[n] - expected[n]).abs().max() for n in expected) > 1e-3


INSIDE = {
    "uni": {"decoder": "uni_1_0.5"},
    "attn": {"decoder": "uni_1_0.5-attn_2_0.25"},
    "both": {"visual": tiny.drop, "decoder": "attn_1_0.5-uni_2_0.25"},
}


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", INSIDE.values(), ids=INSIDE)
def test_gradients_inside_the_decoder_are_those_by_hand(models, where, side, reentrant):
    model, inputs = checkpointed(fresh(models), reentrant), labelled(side=side)
    with vidtok.attach(model, **where) as handle:
        mine = model(**inputs, use_cache=False).loss
        got = gradients(model, mine)
        stay = seen(handle.report(), inputs)
    if reentrant is not None:
        model.gradient_checkpointing_disable()
    loss = by_hand(model, inputs, stay)
    expected = gradients(model, loss)
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    # Other tokens give other gradients.
    stay[max(stay)] = stay[max(stay)] | (inputs["input_ids"] == tiny.VIDEO)
    other = gradients(model, by_hand(model, inputs, stay))
    assert max((other[n] - expected[n]).abs().max() for n in expected) > 1e-3


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_loss_falls_in_the_trainer_with_stages_inside(models, tmp_path, reentrant):
    model = fresh(models)
    options = {} if reentrant is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }  # fmt: skip
    reduction = TokenReduction(visual="uniform:ratio=0.5", decoder="uni_1_0.5-attn_2_0.25")
    run = trainer(model, tmp_path, [reduction], **options)
    run.train()
    curve = losses(run)
    assert curve[-1] < 0.7 * curve[0]
    layers = reduction.handle.report().layers
    assert layers[0].tokens > layers[1].tokens > layers[2].tokens


# ---------------------------------------------------------------------- lifecycle
def test_evaluation_and_prediction_between_steps_run_reduced(models, tmp_path):
    model = fresh(models)
    seen = []

    class Predicts(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            seen.append(run.predict(run.eval_dataset).metrics["test_loss"])

    reduction = TokenReduction(visual=by_rule)
    run = trainer(
        model, tmp_path, [reduction, Predicts()], steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
        prediction_loss_only=True,
    )  # fmt: skip
    run.train()
    inputs = run.train_dataset.inputs
    with torch.no_grad():
        expected = by_hand(model.eval(), inputs, {0: every_other(inputs)})
        plain = model(**inputs, use_cache=False).loss
    evaluated = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert len(evaluated) == len(seen) == 2
    for loss in (*evaluated, *seen, *losses(run)):
        assert abs(loss - float(expected)) < 1e-3 < abs(loss - float(plain))
    # After the training nothing is reduced.
    assert abs(run.evaluate()["eval_loss"] - float(plain)) < 1e-3


def test_checkpoints_are_those_of_the_model_alone(models, tmp_path):
    model = fresh(models)
    files = {}
    for name, callbacks in (("plain", []), ("reduced", [TokenReduction(visual=tiny.drop)])):
        run = trainer(copy.deepcopy(model), tmp_path / name, callbacks, steps=2, save_strategy="steps", save_steps=1)
        run.train()
        folder = tmp_path / name / "checkpoint-1"
        files[name] = sorted(p.name for p in folder.iterdir())
        files[name, "weights"] = load_file(folder / "model.safetensors")
        files[name, "config"] = (folder / "config.json").read_text()
    assert files["plain"] == files["reduced"]
    assert files["plain", "config"] == files["reduced", "config"]
    assert set(files["plain", "weights"]) == set(files["reduced", "weights"])
    loaded = type(model).from_pretrained(tmp_path / "reduced" / "checkpoint-2").train()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    # Training goes on from a checkpoint.
    reduction = TokenReduction(visual=tiny.drop)
    again = trainer(loaded, tmp_path / "reduced", [reduction], steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "reduced" / "checkpoint-2"))
    assert again.state.global_step == 3


def test_an_exception_leaves_the_model_as_it_was(models, tmp_path):
    model, inputs = fresh(models), labelled(ROWS)
    before = hooks(model)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(**inputs, use_cache=False).logits.shape
    reduction = TokenReduction(visual=tiny.drop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(model, tmp_path, [reduction, Fails()]).train()
    with torch.no_grad():  # the first call after it takes the attachment out
        assert model(**inputs, use_cache=False).logits.shape == wanted
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="stop"), TokenReduction(visual=tiny.drop) as reduction:
        trainer(model, tmp_path, [reduction, Fails()]).train()
    assert hooks(model) == before
    assert not reduction.handle.active
    # A second training attaches anew, whatever became of the first.
    for fails in ([Fails()], []):
        run = trainer(model, tmp_path, [reduction, *fails], steps=2)
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            run.train()
    assert hooks(model) == before


def test_another_attachment_after_an_exception(models, tmp_path):
    model = fresh(models)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(model, tmp_path, [TokenReduction(visual=tiny.drop), Fails()]).train()
    with vidtok.attach(model, visual=tiny.merge) as handle, torch.no_grad():
        model(**labelled(ROWS), use_cache=False)
        assert handle.report().samples


def test_what_attach_refuses_is_refused_when_training_begins(models, tmp_path):
    model = fresh(models)
    before = hooks(model)
    with pytest.raises(ValueError, match="expected vision=, visual= or decoder="):
        TokenReduction()
    with pytest.raises(ValueError, match="uniform"):
        trainer(model, tmp_path, [TokenReduction(visual="unfirm:ratio=0.5")]).train()
    with vidtok.attach(model, visual=tiny.drop), pytest.raises(ValueError, match="restore"):
        trainer(model, tmp_path, [TokenReduction(visual=tiny.drop)]).train()
    with pytest.raises(ValueError, match="one process per GPU"):
        TokenReduction(visual=tiny.drop).on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=model)
    with pytest.raises(ValueError, match="expected label_smoothing_factor=0"):
        trainer(model, tmp_path, [TokenReduction(visual=tiny.drop)], label_smoothing_factor=0.1).train()
    assert hooks(model) == before


def test_wrapped_by_accelerate(models, tmp_path):
    """A model that ``Accelerator.prepare`` returned, and one inside DistributedDataParallel of one process."""
    from accelerate import Accelerator

    model, inputs = fresh(models), labelled(ROWS)
    with vidtok.attach(model, visual=tiny.drop):
        expected = model(**inputs, use_cache=False).loss
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    with TokenReduction(visual=tiny.drop) as reduction:
        reduction.attach(prepared)
        loss = prepared(**inputs, use_cache=False).loss
        torch.testing.assert_close(loss, expected)
        accelerator.backward(loss)
        optimizer.step()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            optimizer.zero_grad()
            wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            reduction.attach(wrapped)
            later = wrapped(**inputs, use_cache=False).loss
            later.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        finally:
            torch.distributed.destroy_process_group()
    assert later < expected


def test_packed_samples_train_as_padded_rows(models):
    """Samples one behind another in one row, told apart by positions that restart."""
    model, inputs = fresh(models), labelled(ROWS)
    parts = [tiny.row(inputs, ROWS, i) for i in range(2)]
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    position = []
    for part in parts:
        place, _ = model.model.get_rope_index(**{k: part[k] for k in names if k in part})
        position.append(torch.cat([torch.arange(place.shape[-1])[None, None], place]))
    per_token = [k for k in ("input_ids", "mm_token_type_ids", "labels") if k in inputs]
    packed = {k: torch.cat([part[k] for part in parts], 1) for k in per_token}
    packed |= {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw")}
    packed["position_ids"] = torch.cat(position, -1)
    for where in ({"visual": tiny.drop}, {"visual": tiny.drop, "decoder": "uni_1_0.5-attn_2_0.25"}):
        with vidtok.attach(model, **where):
            loss = model(**inputs, use_cache=False).loss
            expected = gradients(model, loss)
            again = model(**packed, use_cache=False).loss
            got = gradients(model, again)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_transv_is_trained_by_the_optimizer_that_it_is_given_to(models, tmp_path):
    from vidtok.models.transv import TransV

    model = fresh(models)
    transv = TransV(model.model.language_model, "uni_1_0.5", init="attention")
    before = copy.deepcopy(transv.state_dict())
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": transv.parameters()}], lr=1e-3)
    run = trainer(
        model, tmp_path, [TokenReduction(decoder=vidtok.Drop("uni_1_0.5", merge=transv))], data=Rows(side="right")
    )
    run.optimizer = optimizer
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    gate = next(name for name in before if name.endswith("alpha"))
    assert before[gate] == 0 != transv.state_dict()[gate]
    assert not any("alpha" in name for name in model.state_dict())


def test_metrics_on_logits_of_reduced_rows(models, tmp_path):
    """With rows padded on the left the answers stand at the end of logits and labels alike."""
    model, seen = fresh(models), []

    def metrics(prediction):
        seen.append((torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)))
        return {"accuracy": 0.0}

    def first(logits):  # older versions hand over all outputs
        return logits[0] if isinstance(logits, tuple) else logits

    class Stops(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            control.should_training_stop = True

    run = Trainer(
        model, arguments(tmp_path, 2, eval_strategy="steps", eval_steps=1, learning_rate=0.0), train_dataset=Rows(),
        eval_dataset=Rows(2), data_collator=lambda items: {k: v.clone() for k, v in items[0].items()},
        callbacks=[TokenReduction(visual=tiny.drop), Stops()], compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: first(logits)[:, -5:-1].argmax(-1),
    )  # fmt: skip
    run.train()
    inputs = run.train_dataset.inputs
    with vidtok.attach(model.eval(), visual=tiny.drop), torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[:, -5:-1].argmax(-1)
    predictions, labels = seen[0]
    assert torch.equal(predictions, expected.repeat(2, 1))
    assert torch.equal(labels[:, -4:], inputs["input_ids"][:, -4:].repeat(2, 1))


def test_without_the_watch_an_exception_leaves_the_attachment(models, tmp_path, monkeypatch):
    model = fresh(models)
    before = hooks(model)
    monkeypatch.setattr("vidtok.training.callback._Running.find", staticmethod(lambda: None))
    reduction = TokenReduction(visual=tiny.drop)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(model, tmp_path, [reduction, Fails()]).train()
    with torch.no_grad():
        model(**labelled(ROWS), use_cache=False)
    assert hooks(model) > before
    reduction.restore()
    assert hooks(model) == before


def test_a_training_that_ended_is_not_held(models, tmp_path):
    model, reduction = fresh(models), TokenReduction(visual=tiny.drop)
    run = trainer(model, tmp_path, [reduction], steps=1)
    run.train()
    # The frame of train() would keep the Trainer alive, with data and optimizer.
    assert reduction._training is None
    assert reduction.handle.running is None
