"""Options of ``vidtok train retrieval`` and ``vidtok eval retrieval``: one table for typer and argparse alike."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints


def _option(default: Any, text: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True)
class RetrievalOptions:
    """Names and meanings follow the command lines of CLIP4Clip and STOP where these have them."""

    data_path: str = _option("", "Folder of the annotation files (MSR-VTT: MSRVTT_data.json).", "PATH")
    features_path: str = _option("", "Folder of the videos.", "DIR")
    datatype: str = _option("msrvtt", "msrvtt, msvd, didemo, lsmdc or activitynet.")
    train_csv: str | None = _option(None, "File that lists the training videos, when not beside --data_path.", "FILE")
    val_csv: str | None = _option(None, "File that lists the test videos, when not beside --data_path.", "FILE")
    output_dir: str = _option("output", "Folder for the log, checkpoints, the model and metrics.json.", "DIR")
    do_train: int = _option(1, "1 trains.")
    do_eval: int = _option(1, "1 evaluates: after every epoch, or alone.")
    split: str = _option("test", "What is evaluated on: test or val.")
    preset: str = _option("", "training (r 2, 12 frames), inference (r 4, 12 frames) or prototyping (r 8, 8 frames).")
    pretrained_clip_name: str = _option(
        "ViT-B/32",
        "Folder or file of a CLIP or of a trained model, or a name that a local cache holds.",
        "NAME_OR_PATH",
    )
    tokenizer: str | None = _option(None, "Folder of CLIP's tokenizer, when not beside the weights.", "DIR")
    init_model: str | None = _option(None, "Weights of a trained model to begin from.", "PATH")
    temporal_prompt: str = _option("DGL", "none (CLIP4Clip), DGL, or group2-2 (STOP).")
    frame_weights: str = _option("video", "Scale STOP's frame weights per video, or per batch as published.")
    sim_header: str = _option("meanP", "How frames become one vector: meanP.")
    loose_type: bool = _option(True, "Separate towers, the only form.")
    freeze_layer_num: int | None = _option(
        None, "Layers of CLIP that stay as they are, -1 for none (all with prompts, none without)."
    )
    tome_r: str = _option("0", "Tokens merged per layer: one number, one for each layer with commas, or R:INFLECTION.")
    tome_trace_source: bool = _option(
        False,
        "Evaluation writes sources.npz to --output_dir: in which token every patch of every frame ended. Training "
        "keeps the trace and is otherwise the same.",
    )
    tome_prop_attn: bool = _option(True, "Weigh merged tokens by their size in attention.")
    tome_metric: str = _option("keys", "What similarity is taken of: keys, values or hidden.")
    tome_frame_merging: bool = _option(False, "Also join frames along the depth.")
    tome_merge_layers: str = _option("8-9-10", "Layers before which frames join, from 0.")
    tome_merge_frame_nums: str = _option("2-2-3", "How many become one there.")
    tome_merge_proportions: str = _option("30-10", "Percent of tokens that merge when frames join, and after it.")
    max_frames: int = _option(12, "Frames per video.")
    max_words: int = _option(32, "Tokens per caption, start and end among them.")
    image_size: int | None = _option(None, "Height and width of frames (the model's).")
    slice_framepos: int = _option(2, "Frames from the head (0), the tail (1), or spread evenly (2).")
    train_frame_order: int = _option(0, "Frames in order (0), reversed (1) or shuffled (2) in training.")
    eval_frame_order: int = _option(0, "The same in evaluation.")
    feature_framerate: float = _option(0.0, "Candidate frames per second; 0 makes every frame one.")
    expand_msrvtt_sentences: bool = _option(True, "Every caption is a pair; otherwise one caption per video and epoch.")
    lr: float = _option(1e-3, "Learning rate of new weights.")
    coef_lr: float = _option(5e-4, "Factor on it for CLIP's weights.")
    weight_decay: float = _option(0.2, "Weight decay.")
    epochs: int = _option(5, "Passes over the pairs.")
    batch_size: int = _option(32, "Pairs per step, over all processes and accumulated parts.")
    batch_size_val: int = _option(16, "Videos at once in evaluation, per process.")
    gradient_accumulation_steps: int = _option(1, "Parts of a batch that are computed one after another.")
    warmup_proportion: float = _option(0.1, "Share of the steps in which the rate rises.")
    max_grad_norm: float = _option(1.0, "Norm of the gradient at most; 0 leaves it.")
    amp: str = _option(
        "auto", "Precision: auto (bf16 on GPUs that have it, fp16 on others, no on a CPU), bf16, fp16, no."
    )
    seed: int = _option(42, "Seed of everything random.")
    num_thread_reader: int = _option(0, "Processes that decode videos.")
    resume: str | None = _option(None, "Go on from this checkpoint folder, or auto for the newest one.", "DIR")
    save_steps: int = _option(0, "Also save after so many steps.")
    keep_checkpoints: int = _option(2, "Checkpoints that stay.")
    stop_after: int | None = _option(None, "Stop after so many steps, for runs done in parts.")
    n_display: int = _option(50, "Steps between lines of the log.")
    tensorboard: bool = _option(False, "Also write TensorBoard's files.")
    gallery: str = _option("videos", "Video to text: against the other videos' best captions, or all captions.")
    frame_cache: str | None = _option(None, "Folder that keeps decoded frames.", "DIR")
    frame_cache_gb: float = _option(50.0, "Size of it at most.")
    video_backend: str = _option("auto", "auto, decord or pyav.")
    isolate: bool = _option(True, "Decode each video in a process of its own, with limits.")
    allow_missing: bool = _option(False, "Go on without videos that are missing or do not decode.")
    allow_outside: bool = _option(False, "Take names in annotations that lead out of --features_path.")
    device: str = _option("auto", "auto or cpu.")
    #: Names of the options that were given, as against defaults.
    given: frozenset[str] = field(default=frozenset(), metadata={"hidden": True})


def make(given: Mapping[str, Any], **defaults: Any) -> RetrievalOptions:
    """Options from what was given, over ``defaults``."""
    named = {k: v for k, v in given.items() if v is not None}
    return RetrievalOptions(**{**defaults, **named, "given": frozenset(named)})


def _table() -> list[tuple[str, Any, Any, str, str | None]]:
    """(name, type without None, default, help, metavar) of every option."""
    hints = get_type_hints(RetrievalOptions)
    rows = []
    for f in fields(RetrievalOptions):
        if f.metadata.get("hidden"):
            continue
        kinds = [k for k in getattr(hints[f.name], "__args__", (hints[f.name],)) if k is not type(None)]
        default = None if f.default is MISSING else f.default
        rows.append((f.name, kinds[0], default, f.metadata["help"], f.metadata["metavar"]))
    return rows


def _spellings(name: str) -> list[str]:
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def add_commands(app: Any) -> None:
    """Give ``app`` the commands ``train retrieval`` and ``eval retrieval``."""
    import typer

    # typer hands the context to a parameter of this type.
    _help.__annotations__["context"] = typer.Context
    for verb, text, defaults in (
        ("train", "Train a model on a task.", {}),
        ("eval", "Score a model on a task.", {"do_train": 0}),
    ):
        group = typer.Typer(help=text, rich_markup_mode=None)
        what = "Train and score" if verb == "train" else "Score"
        group.command("retrieval", help=f"{what} CLIP4Clip or STOP on video-text retrieval, with token merging.")(
            _command(defaults)
        )
        group.callback(invoke_without_command=True)(_help)
        app.add_typer(group, name=verb)


def _help(context: Any) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _command(defaults: Mapping[str, Any]) -> Any:
    import typer

    def command(**given: Any) -> None:
        given.pop("debug", None)
        from vidtok.cli import retrieval

        retrieval.run(make(given, **defaults))

    parameters, annotations = [], {}
    for name, kind, default, text, metavar in _table():
        decls = [f"{s}/--no-{s[2:]}" for s in _spellings(name)] if kind is bool else _spellings(name)
        shown = "" if default in (None, "") else f" [default: {defaults.get(name, default)}]"
        metavar = metavar or {int: "N", float: "X", str: "TEXT"}.get(kind)
        option = typer.Option(None, *decls, help=text + shown, metavar=metavar, show_default=False)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)
        )
        annotations[name] = kind | None
    debug = typer.Option(False, "--debug", help="Show the traceback of an error.")
    parameters.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=debug, annotation=bool))
    # typer reads options off a signature.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**annotations, "debug": bool}
    return command


def parse(arguments: Sequence[str] | None = None, prog: str | None = None) -> RetrievalOptions:
    """The same options by argparse, as the published scripts take them: ``--do_train 1``, ``--do_train``, or neither.

    Unlike the commands, nothing runs that was not asked for. ``do_train`` also evaluates after every epoch, as the
    published scripts do, unless ``--do_eval 0`` is there.
    """
    parser = argparse.ArgumentParser(prog=prog, description="Video-text retrieval with CLIP4Clip and STOP.")
    for name, kind, default, text, metavar in _table():
        extra: dict[str, Any] = {"default": None, "dest": name}
        text = text.replace("%", "%%") + ("" if default in (None, "") else f" (default: {default})")
        if kind is bool:
            parser.add_argument(*_spellings(name), action=argparse.BooleanOptionalAction, help=text, **extra)
        elif name in ("do_train", "do_eval"):
            parser.add_argument(*_spellings(name), type=int, nargs="?", const=1, choices=(0, 1), help=text, **extra)
        else:
            parser.add_argument(*_spellings(name), type=kind, help=text, metavar=metavar, **extra)
    given = vars(parser.parse_args(arguments))
    return make(given, do_train=0, do_eval=given["do_train"] or 0)
