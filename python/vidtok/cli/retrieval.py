"""``vidtok train retrieval`` and ``vidtok eval retrieval``: options to data, model, training and a table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidtok.cli.errors import InputError, one_line
from vidtok.cli.retrieval_model import build, check_fit, locate, merges, plain, read_best, save, write_scores
from vidtok.cli.retrieval_options import RetrievalOptions
from vidtok.cli.talk import Talk
from vidtok.data import VideoError
from vidtok.data._decode import BACKENDS
from vidtok.data.retrieval import (
    EvaluationClips,
    FrameCache,
    FrameLoader,
    FrameRule,
    Pairs,
    TrainingPairs,
    Words,
    load_pairs,
    load_tokenizer,
)
from vidtok.data.retrieval.frames import ORDERS, POSITIONS
from vidtok.data.retrieval.pairs import counted
from vidtok.evaluation.retrieval import GALLERIES
from vidtok.training.folders import recover
from vidtok.training.retrieval import Recipe, accelerator_for, train


def run(options: RetrievalOptions, model: Any = None) -> dict[str, Any]:
    """Train, evaluate, or both; returns the scores by direction as they went into ``metrics.json``.

    Args:
        options: what the command line said.
        model: used instead of loading one.

    Raises:
        ValueError: one sentence about what is missing or does not fit.
        FileNotFoundError: the same about files.
    """
    try:
        return _run(options, model)
    except VideoError as error:
        # torch puts the traceback of the decoding process in front.
        raise VideoError(str(error).strip().splitlines()[-1].split("VideoError: ", 1)[-1]) from error
    except ImportError as error:
        if not str(error).startswith("expected "):
            raise
        # An optional package that was asked for; nothing is wrong with the install.
        raise InputError(str(error)) from error


def _run(options: RetrievalOptions, model: Any) -> dict[str, Any]:
    options = _preset(options)
    _check(options)
    recipe = _recipe(options)
    # Decoding processes are forked from one that has used the tokenizer.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    accelerator = accelerator_for(recipe, cpu=options.device == "cpu")
    talk = Talk(accelerator.is_main_process)
    # Annotations first: a wrong path is found before a large checkpoint is read.
    with talk.warnings():
        training = _pairs(options, "train") if options.do_train else None
        testing = _pairs(options, options.split) if options.do_eval else None
    for what, pairs in (("Training on", training), ("Evaluating on", testing)):
        if pairs is not None:
            talk(f"{what} {counted(len(pairs.clips), 'video')} with {counted(len(pairs), 'caption')}")
    try:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected --output_dir as a folder that can be made, got {options.output_dir!r} ({error.strerror})"
        ) from None
    place = locate(options.pretrained_clip_name) if model is None or options.tokenizer is None else None
    if model is None:
        assert place is not None
        # Prompts are drawn at random; every process draws the same.
        torch.manual_seed(options.seed)
        with talk.warnings():
            model = build(options, place)
    own: Any = getattr(model, "config", None)
    frames = options.max_frames if "max_frames" in options.given else getattr(own, "max_frames", options.max_frames)
    length = options.max_words if "max_words" in options.given else getattr(own, "max_words", options.max_words)
    words = Words(load_tokenizer(options.tokenizer or place or "."), length)
    check_fit(model, words)
    sizes: Any = getattr(model, "sizes", None)
    size = options.image_size if options.image_size is not None else int(getattr(sizes, "image", 224))
    test = None
    if testing is not None:
        test = EvaluationClips(testing, _frames(options, frames, size, False), options.allow_missing)
    scores: dict[str, Any] = {}
    if training is not None:
        data = TrainingPairs(
            training, words, _frames(options, frames, size, True), options.seed, options.expand_msrvtt_sentences,
            options.allow_missing,
        )  # fmt: skip
        model, scores = _train(options, recipe, accelerator, talk, model, data, test, words)
    elif test is not None:
        model = model.to(accelerator.device)
        scores = _evaluate(options, accelerator, talk, model, test, words)
    if accelerator.is_main_process and scores:
        write_scores(scores, Path(options.output_dir))
        _print(scores)
    return plain(scores)


def _preset(options: RetrievalOptions) -> RetrievalOptions:
    if not options.preset:
        return options
    from vidtok.systems.stop import PRESETS

    if options.preset not in PRESETS:
        raise InputError(f"expected a preset among {', '.join(PRESETS)}, got {options.preset!r}")
    chosen = {k: v for k, v in PRESETS[options.preset].items() if k not in options.given}
    names: dict[str, Any] = {k: str(v) if k == "tome_r" else v for k, v in chosen.items()}
    return replace(options, **names, given=options.given | set(names))


def _check(options: RetrievalOptions) -> None:
    if not options.do_train and not options.do_eval:
        raise InputError("expected --do_train 1 or --do_eval 1, got neither")
    for name in ("data_path", "features_path", "output_dir"):
        if not getattr(options, name):
            raise InputError(f"expected --{name}, got none")
    for name, value in vars(options).items():
        if isinstance(value, str) and ("\0" in value or len(value) > 4096):
            raise InputError(
                f"expected --{name} of at most 4096 characters without NUL, got {one_line(repr(value), 40)}"
            )
    if not 0 < options.frame_cache_gb < 1e9:
        raise InputError(f"expected --frame_cache_gb above 0 and below 1e9, got {options.frame_cache_gb}")
    for name, known in (
        ("gallery", GALLERIES),
        ("device", ("auto", "cpu")),
        ("video_backend", BACKENDS),
        ("split", ("test", "val")),
        ("slice_framepos", range(len(POSITIONS))),
        ("train_frame_order", range(len(ORDERS))),
        ("eval_frame_order", range(len(ORDERS))),
        ("do_train", (0, 1)),
        ("do_eval", (0, 1)),
    ):
        if getattr(options, name) not in known:
            raise InputError(f"expected --{name} among {', '.join(map(str, known))}, got {getattr(options, name)!r}")
    for name in ("max_frames", "batch_size_val", "n_display", "keep_checkpoints", "image_size", "stop_after"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"expected --{name} of at least 1, got {value}")
    for name in ("num_thread_reader", "save_steps", "feature_framerate"):
        if getattr(options, name) < 0:
            raise InputError(f"expected --{name} of at least 0, got {getattr(options, name)}")
    merges(options.tome_r)


def _recipe(options: RetrievalOptions) -> Recipe:
    amp = options.amp
    if amp == "auto":
        gpu = torch.cuda.is_available() and options.device != "cpu"
        amp = "no" if not gpu else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return Recipe(
        options.lr, options.coef_lr, options.weight_decay, options.epochs, options.batch_size,
        options.gradient_accumulation_steps, options.warmup_proportion, options.max_grad_norm, amp, options.seed,
    )  # fmt: skip


def _pairs(options: RetrievalOptions, split: str) -> Pairs:
    table = options.train_csv if split == "train" else options.val_csv
    return load_pairs(
        options.datatype, split, options.data_path, options.features_path, table=table,
        allow_missing=options.allow_missing, allow_outside=options.allow_outside,
    )  # fmt: skip


def _frames(options: RetrievalOptions, count: int, size: int, training: bool) -> FrameLoader:
    order = options.train_frame_order if training else options.eval_frame_order
    position = POSITIONS[options.slice_framepos]
    rule = FrameRule(
        count, size, position, ORDERS[order], training and position == "uniform", options.feature_framerate or None
    )
    cache = FrameCache(options.frame_cache, int(options.frame_cache_gb * 2**30)) if options.frame_cache else None
    return FrameLoader(rule, cache, options.video_backend, options.isolate)


def _evaluate(
    options: RetrievalOptions, accelerator: Any, talk: Talk, model: Any, test: EvaluationClips, words: Words
) -> dict[str, Any]:
    from vidtok.evaluation.retrieval import evaluate

    own = accelerator.unwrap_model(model)
    traced = getattr(getattr(own, "config", None), "tome_trace_source", False)
    with talk.bar("Evaluating") as notify:
        scores = evaluate(
            model, test, words, batch_size=options.batch_size_val, workers=options.num_thread_reader,
            gallery=options.gallery, accelerator=accelerator, notify=notify,
            sources=traced and own.tome is not None,
        )  # fmt: skip
    _unreadable(talk, scores["unreadable"], "left out")
    if traced and accelerator.is_main_process:
        _write_sources(scores, Path(options.output_dir) / "sources.npz", talk)
    return {k: v for k, v in scores.items() if k not in ("sources", "clips")}


def _write_sources(scores: dict[str, Any], path: Path, talk: Talk) -> None:
    path.unlink(missing_ok=True)
    if "sources" not in scores:
        talk(f"No tokens merge, so that --tome_trace_source writes no {path.name}")
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, clips=np.array(scores["clips"]), sources=scores["sources"].numpy())
    os.replace(partial, path)


def _unreadable(talk: Talk, names: list[str], what: str) -> None:
    if names:
        talk(f"{counted(len(names), 'video')} {what} for not decoding: {one_line(', '.join(names))}")


def _train(
    options: RetrievalOptions,
    recipe: Recipe,
    accelerator: Any,
    talk: Talk,
    model: Any,
    data: TrainingPairs,
    test: EvaluationClips | None,
    words: Words,
) -> tuple[Any, dict[str, Any]]:
    model_folder, folder = (Path(options.output_dir) / name for name in ("model", "best"))
    if accelerator.is_main_process:
        recover(model_folder)
        recover(folder)
    accelerator.wait_for_everyone()
    best: list[float] = []

    def after(current: Any, epoch: int) -> dict[str, Any]:
        assert test is not None
        scores = _evaluate(options, accelerator, talk, current, test, words)
        one = scores["text_to_video"].r1
        talk(f"Epoch {epoch + 1}: text to video R@1 {one:.1f}, video to text R@1 {scores['video_to_text'].r1:.1f}")
        if not best:
            best.append(read_best(folder) if epoch and options.resume is not None else -1.0)
        if one > best[0]:
            best[0] = one
            save(accelerator, current, words, folder, scores)
        return scores

    with talk.bar("Training") as notify:
        done = train(
            model, data, recipe, options.output_dir, accelerator=accelerator, workers=options.num_thread_reader,
            resume=options.resume, save_steps=options.save_steps, keep=options.keep_checkpoints,
            log_every=options.n_display, tensorboard=options.tensorboard, stop_after=options.stop_after,
            evaluate=after if test is not None else None,
            notify=lambda steps, total, loss: notify(steps, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    _unreadable(talk, done.unreadable, "replaced")
    save(accelerator, done.model, words, model_folder)
    if test is not None and not done.scores:
        # A run whose last step was done before it began.
        return done.model, _evaluate(options, accelerator, talk, done.model, test, words)
    return done.model, done.scores[-1] if done.scores else {}


def _print(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "R@1", "R@5", "R@10", "MdR", "MnR", "queries"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in (("text_to_video", "Text to video"), ("video_to_text", "Video to text")):
        s = scores[key]
        table.add_row(
            label, *(f"{v:.1f}" for v in (s.r1, s.r5, s.r10)), f"{s.median:.1f}", f"{s.mean:.1f}", f"{s.queries}"
        )
    Console(highlight=False).print(table)
