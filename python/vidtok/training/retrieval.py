"""Training of retrieval models: AdamW with layer-wise rates, a cosine, AMP, accumulation and DDP by accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from vidtok._check import fail
from vidtok.data.retrieval.datasets import EpochSampler, TrainingPairs
from vidtok.data.retrieval.frames import describe, normalize
from vidtok.training.checkpoints import Checkpoints
from vidtok.training.records import Records

AMP = ("no", "bf16", "fp16")
# Settings of a model that change nothing of what it learns.
_NO_MATTER = ("tome_trace_source", "gradient_checkpointing")


@dataclass(frozen=True)
class Recipe:
    """How a retrieval model is trained; the defaults are STOP's for MSR-VTT.

    Args:
        lr: rate of new weights.
        coef_lr: factor on it for CLIP's own weights.
        weight_decay: of AdamW.
        epochs: passes over the pairs.
        batch_size: pairs per optimizer step over all processes; each process and each of ``accumulation`` parts takes
            an equal share.
        accumulation: parts of a batch computed one after another; the loss sees only the pairs of one part.
        warmup: share of all steps in which the rate rises from 0; a cosine takes it back to 0.
        clip: norm of the gradient at most; 0 leaves it.
        amp: ``no``, ``bf16`` or ``fp16``.
        seed: of the order of pairs, of frames, and of dropout.
    """

    lr: float = 1e-3
    coef_lr: float = 5e-4
    weight_decay: float = 0.2
    epochs: int = 5
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    amp: str = "no"
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("lr", "coef_lr", "weight_decay", "clip"):
            value = getattr(self, name)
            # Products of two of these are held in float32.
            if not 0 <= value <= 1e15:
                fail(f"{name} of at least 0 and at most 1e15", f"{value}")
        for name in ("epochs", "batch_size", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                fail(f"{name} as a whole number of at least 1", f"{value!r}")
        if not 0 <= self.seed < 2**63:
            fail("a seed from 0 to 2**63 - 1", f"{self.seed}")
        if not 0 <= self.warmup <= 1:
            fail("a warmup between 0 and 1", f"{self.warmup}")
        if self.amp not in AMP:
            fail(f"amp among {', '.join(AMP)}", repr(self.amp))


def accelerator_for(recipe: Recipe, *, cpu: bool = False) -> Any:
    """accelerate's Accelerator for a recipe: device, autocast, accumulation, DDP.

    Raises:
        ValueError: for fp16 without a GPU.
        ImportError: without accelerate.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        raise ImportError("expected the package accelerate (pip install 'vidtok[train]'), got none") from None
    if recipe.amp == "fp16" and (cpu or not torch.cuda.is_available()):
        fail("a GPU for fp16 (bf16 runs anywhere)", "none")
    return Accelerator(
        cpu=cpu,
        mixed_precision=recipe.amp,
        gradient_accumulation_steps=recipe.accumulation,
        # Prompts of the last layer, and towers that are frozen, may be without gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@dataclass
class Trained:
    """What :func:`train` leaves: the model out of its wrappers, steps done, the last loss, what was evaluated.

    ``unreadable`` names clips that did not decode and were replaced (``skip_unreadable`` of the data).
    """

    model: Any
    steps: int
    loss: float
    scores: list[Any]
    unreadable: list[str]


def train(
    model: Any,
    data: TrainingPairs,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    accelerator: Any = None,
    workers: int = 0,
    resume: str | Path | None = None,
    save_steps: int = 0,
    keep: int = 2,
    log_every: int = 50,
    tensorboard: bool = False,
    stop_after: int | None = None,
    evaluate: Callable[[Any, int], Any] | None = None,
    notify: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Train a model and leave checkpoints that training goes on from, bit for bit.

    ``output_dir`` gets ``log.jsonl`` (a line per ``log_every`` steps and per evaluation), ``checkpoints/step_…`` after
    every epoch (the last ``keep``), and TensorBoard's files if asked.

    Args:
        model: ``model(input_ids, token_type_ids, attention_mask, video, video_mask)`` is the loss, with video of
            ``[B, T, 3, H, W]`` at CLIP's scale; ``model.parameter_groups(lr, coef_lr, weight_decay)`` feeds AdamW.
        data: pairs.
        recipe: how.
        output_dir: made if absent.
        accelerator: of :func:`accelerator_for`, which makes one by default.
        workers: processes that decode.
        resume: a checkpoint folder, or ``auto`` for the newest one in ``output_dir`` if there is any.
        save_steps: also save after so many steps; 0 saves after epochs only.
        keep: checkpoints that stay.
        log_every: steps between lines.
        tensorboard: also write its files.
        stop_after: steps of this call at most, for runs that are done in parts.
        evaluate: called with the model and the epoch after each; what it returns is kept.
        notify: called with (steps done, steps in all, loss).

    Raises:
        ValueError: for data smaller than a batch, a checkpoint of another recipe or of other settings of the model, an
            ``output_dir`` with checkpoints that training does not go on from, or a loss that is no number.
    """
    from transformers import get_cosine_schedule_with_warmup

    accelerator = accelerator or accelerator_for(recipe)
    share, rest = divmod(recipe.batch_size, accelerator.num_processes * recipe.accumulation)
    if rest or not share:
        parts = f"{accelerator.num_processes} processes x {recipe.accumulation} parts"
        fail(f"a batch_size that {parts} divide", f"{recipe.batch_size}")
    if len(data) < recipe.batch_size:
        fail(f"at least one batch of {recipe.batch_size} pairs", f"{len(data)} pairs")
    # Also what dropout draws from; each process its own.
    torch.manual_seed(recipe.seed + accelerator.process_index)
    order = EpochSampler(data, recipe.seed)
    # A generator of its own, so that beginning an epoch draws nothing from the one that dropout uses.
    own = torch.Generator().manual_seed(recipe.seed)
    plain_loader = DataLoader(
        data, share, sampler=order, num_workers=workers, drop_last=True, generator=own, pin_memory=False
    )
    settings = getattr(model, "config", None)
    groups = model.parameter_groups(recipe.lr, recipe.coef_lr, recipe.weight_decay)
    if not any(len(g["params"]) for g in groups):
        fail("a model with weights to train", "one in which all are frozen")
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6)
    model, optimizer, loader = accelerator.prepare(model, optimizer, plain_loader)
    micro = len(loader)
    per_epoch = math.ceil(micro / recipe.accumulation)
    total = per_epoch * recipe.epochs
    schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, round(recipe.warmup * total), total)
    accelerator.register_for_checkpointing(schedule)
    # What the model merges and which prompts it has are no part of its weights.
    facts = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else {}
    facts = {k: v for k, v in facts.items() if k not in _NO_MATTER}
    facts |= {**asdict(recipe), "pairs": len(data), "processes": accelerator.num_processes}
    facts |= {"frames": describe(data.frames.rule), "expand": data.expand, "max_words": data.words.max_words}
    saved = Checkpoints(Path(output_dir) / "checkpoints", accelerator, facts, keep)
    done = saved.load(resume)
    steps, begun = done, done
    loss, scores = torch.zeros(()), []
    unreadable: set[int] = set()
    with Records(Path(output_dir), accelerator, tensorboard, fresh=not done) as records:

        def score(epoch: int) -> None:
            if evaluate is not None:
                scores.append(evaluate(model, epoch))
                records.scores(steps, epoch, scores[-1])

        if done and done % per_epoch == 0 and not _of_main(done in records.scored, accelerator):
            # The run that wrote the checkpoint ended before it had evaluated.
            score(done // per_epoch - 1)
        for epoch in range(done // per_epoch, recipe.epochs):
            data.begin(epoch)
            order.begin(epoch)
            model.train()
            skip = (steps - epoch * per_epoch) * recipe.accumulation
            for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
                if data.skip_unreadable:
                    unreadable.update(i for i in batch["unreadable"].tolist() if i >= 0)
                with accelerator.accumulate(model):
                    batch["video"] = normalize(batch["video"])
                    with accelerator.autocast():
                        loss = model(*(batch[k] for k in ORDER))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and recipe.clip:
                        accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()
                _bound(accelerator.unwrap_model(model))
                steps += 1
                if steps % log_every == 0 or steps == total:
                    records.step(steps, epoch, _number(loss, steps), schedule.get_last_lr())
                if notify is not None:
                    notify(steps, total, float(loss.detach()))
                if save_steps and steps % save_steps == 0 and steps % per_epoch:
                    saved.save(steps)
                if stop_after is not None and steps - begun >= stop_after:
                    break
            if steps < (epoch + 1) * per_epoch:
                saved.save(steps)
                break
            _number(loss, steps)
            saved.save(steps)
            score(epoch)
            if stop_after is not None and steps - begun >= stop_after:
                break
    accelerator.wait_for_everyone()
    names = _everywhere({data.pairs.clips[i].name for i in unreadable}, accelerator)
    return Trained(accelerator.unwrap_model(model), steps, float(loss.detach()), scores, names)


def _of_main(value: bool, accelerator: Any) -> bool:
    """What the main process says, in all of them."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return bool(broadcast_object_list([value])[0])


def _everywhere(names: set[str], accelerator: Any) -> list[str]:
    """Of all processes."""
    if accelerator.num_processes == 1:
        return sorted(names)
    from accelerate.utils import gather_object

    return sorted(set(gather_object(sorted(names))))


ORDER = ("input_ids", "token_type_ids", "attention_mask", "video", "video_mask")


def _number(loss: torch.Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        fail("a finite loss (a smaller lr, or amp no, may help)", f"{value} at step {step}")
    return value


def _bound(model: Any) -> None:
    """CLIP keeps its factor on similarities at 100 at most."""
    scale = getattr(model, "logit_scale", None)
    if scale is None:
        scale = getattr(getattr(model, "clip", None), "logit_scale", None)
    if isinstance(scale, torch.Tensor):
        with torch.no_grad():
            scale.clamp_(max=math.log(100))
