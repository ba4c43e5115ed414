"""``vidtok train retrieval`` and ``vidtok eval retrieval``: options to data, model, training and a table."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vidtok.cli.errors import InputError, one_line
from vidtok.cli.retrieval_options import RetrievalOptions
from vidtok.data import VideoError
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
from vidtok.evaluation.retrieval import GALLERIES
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
            talk(f"{what} {len(pairs.clips)} videos with {len(pairs)} captions")
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
    _fits(model, words)
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
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(_plain(scores), indent=2) + "\n", encoding="utf-8")
        _print(scores)
    return _plain(scores)


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
    for name in ("data_path", "features_path"):
        if not getattr(options, name):
            raise InputError(f"expected --{name}, got none")
    for name, known in (
        ("gallery", GALLERIES),
        ("device", ("auto", "cpu")),
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


def merges(text: str) -> int | list[int] | tuple[int, float]:
    """``--tome_r``: a whole number, one for each layer with commas between them, or ``R:INFLECTION``."""
    parts = [p.strip() for p in str(text).split(",")]
    number, colon, inflection = str(text).partition(":")
    try:
        if colon:
            return merges_of(number), float(inflection)
        found = [merges_of(p) for p in parts]
    except ValueError:
        wanted = "--tome_r as a whole number of at least 0, several with commas, or R:INFLECTION"
        raise InputError(f"expected {wanted}, got {text!r}") from None
    return found[0] if len(found) == 1 else found


def merges_of(text: str) -> int:
    """A number of merges."""
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError
    return int(text)


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


def locate(name: str) -> Path:
    """The file or folder of CLIP weights that a path or a name stands for; nothing is downloaded.

    Names of OpenAI's release are looked for as ``ViT-B-32.pt`` in the working folder, in ``modules`` and in
    ``~/.cache/clip``, and with names of the hub in its local cache.

    Raises:
        InputError: when nothing is there.
    """
    from vidtok.systems.stop import NAMES

    if Path(name).exists():
        return Path(name)
    file = f"{name.replace('/', '-')}.pt"
    known = name in NAMES
    places = [Path(file), Path("modules", file), Path.home() / ".cache" / "clip" / file] if known else []
    for place in places:
        if place.is_file():
            return place
    repository = NAMES.get(name, name)
    if repository.count("/") == 1 and not os.path.isabs(repository):
        from huggingface_hub import try_to_load_from_cache

        for weights in ("model.safetensors", "pytorch_model.bin"):
            try:
                found = try_to_load_from_cache(repository, weights)
            except ValueError:
                break
            if isinstance(found, str):
                return Path(found).parent
    looked = f" or {file} in ., modules, ~/.cache/clip" if known else ""
    raise InputError(f"expected --pretrained_clip_name as a path, a name in the hub's cache{looked}, got {name!r}")


def build(options: RetrievalOptions, place: Path) -> Any:
    """The model of a file or folder. Of a trained model, settings stay as saved where no option was given."""
    from vidtok.systems.stop import Config, load

    values = {f.name: getattr(options, f.name) for f in fields(Config) if hasattr(options, f.name)}
    saved = place.is_dir() and (place / "config.json").is_file() and '"stop"' in (place / "config.json").read_text()
    if saved:
        values = {k: v for k, v in values.items() if k in options.given}
    elif values["freeze_layer_num"] is None:
        values["freeze_layer_num"] = 1000 if options.temporal_prompt not in ("none", "") else -1
    values = {k: v for k, v in values.items() if v is not None}
    if "tome_r" in values:
        values["tome_r"] = merges(values["tome_r"])
    try:
        model = load(place, **values)
    except (OSError, KeyError, RuntimeError) as error:
        raise InputError(f"expected weights of a CLIP, got {place.name}, {one_line(error, 200)}") from error
    if options.init_model is not None:
        _init(model, Path(options.init_model))
    return model


def _init(model: Any, path: Path) -> None:
    from vidtok.systems.stop import read

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"expected --init_model as weights, got {path.name!r}, which has none")
    state, own = read(file), model.state_dict()
    wrong = [f"{k} missing" for k in own if k not in state] + [f"{k} unknown" for k in state if k not in own]
    wrong += [f"{k} of another shape" for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise InputError(
            f"expected --init_model with the model's own keys, got {len(wrong)} others: {', '.join(wrong[:10])}"
        )
    model.load_state_dict(state)


def _fits(model: Any, words: Words) -> None:
    sizes = getattr(model, "sizes", None)
    if sizes is None:
        return
    if words.max_words > sizes.context:
        raise InputError(f"expected --max_words of at most {sizes.context}, as the model has, got {words.max_words}")
    if len(words.tokenizer) > sizes.vocabulary:
        raise InputError(f"expected a tokenizer of at most {sizes.vocabulary} ids, got one of {len(words.tokenizer)}")


def _evaluate(
    options: RetrievalOptions, accelerator: Any, talk: Talk, model: Any, test: EvaluationClips, words: Words
) -> dict[str, Any]:
    from vidtok.evaluation.retrieval import evaluate

    with talk.bar("Evaluating") as notify:
        scores = evaluate(
            model, test, words, batch_size=options.batch_size_val, workers=options.num_thread_reader,
            gallery=options.gallery, accelerator=accelerator, notify=notify,
        )  # fmt: skip
    if scores["unreadable"]:
        talk(f"{len(scores['unreadable'])} videos do not decode and are left out: {one_line(scores['unreadable'])}")
    return scores


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
    best = [-1.0]

    def after(current: Any, epoch: int) -> dict[str, Any]:
        assert test is not None
        scores = _evaluate(options, accelerator, talk, current, test, words)
        one = scores["text_to_video"].r1
        talk(f"Epoch {epoch + 1}: text to video R@1 {one:.1f}, video to text R@1 {scores['video_to_text'].r1:.1f}")
        if one > best[0]:
            best[0] = one
            save(accelerator, current, words, Path(options.output_dir) / "best")
        return scores

    with talk.bar("Training") as notify:
        done = train(
            model, data, recipe, options.output_dir, accelerator=accelerator, workers=options.num_thread_reader,
            resume=options.resume, save_steps=options.save_steps, keep=options.keep_checkpoints,
            log_every=options.n_display, tensorboard=options.tensorboard, stop_after=options.stop_after,
            evaluate=after if test is not None else None,
            notify=lambda steps, total, loss: notify(steps, total, f"loss {loss:.3f}"),
        )  # fmt: skip
    save(accelerator, done.model, words, Path(options.output_dir) / "model")
    if test is not None and not done.scores:
        # A run whose last step was done before it began.
        return done.model, _evaluate(options, accelerator, talk, done.model, test, words)
    return done.model, done.scores[-1] if done.scores else {}


def save(accelerator: Any, model: Any, words: Words, folder: Path) -> None:
    """Write a model and its tokenizer as ``--pretrained_clip_name`` takes them."""
    if accelerator.is_main_process:
        from vidtok.systems.stop import CLIP4Clip
        from vidtok.systems.stop import save as write

        plain = accelerator.unwrap_model(model)
        if isinstance(plain, CLIP4Clip):
            write(plain, folder)
            words.tokenizer.save_pretrained(str(folder))
    accelerator.wait_for_everyone()


class Talk:
    """Progress and notes on standard error, from the main process."""

    def __init__(self, main: bool) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            print(one_line(text, 1000), file=sys.stderr, flush=True)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Warnings inside become notes."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for entry in caught:
            self(str(entry.message))

    @contextmanager
    def bar(self, title: str) -> Iterator[Any]:
        """A function of (done, total, note) that moves a bar, on a terminal."""
        if not self.main or not sys.stderr.isatty():
            yield lambda done, total, note="": None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(title)
            yield lambda done, total, note="": bars.update(
                task, completed=done, total=total, description=f"{title} {note}".strip()
            )


def _plain(scores: dict[str, Any]) -> dict[str, Any]:
    return {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in scores.items()}


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
