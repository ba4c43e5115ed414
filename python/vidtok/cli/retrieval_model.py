"""The model of ``vidtok train retrieval``: where weights lie, how they become a model, and how one is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vidtok.cli.errors import InputError, one_line
from vidtok.cli.retrieval_options import RetrievalOptions
from vidtok.data.retrieval import Words
from vidtok.training.folders import whole


def merges(text: str) -> int | list[int] | tuple[int, float]:
    """``--tome_r``: a whole number, one for each layer with commas between them, or ``R:INFLECTION``."""
    parts = [p.strip() for p in str(text).split(",")]
    number, colon, inflection = str(text).partition(":")
    try:
        if colon:
            return _whole(number), float(inflection)
        found = [_whole(p) for p in parts]
    except ValueError:
        wanted = "--tome_r as a whole number of at least 0, several with commas, or R:INFLECTION"
        raise InputError(f"expected {wanted}, got {text!r}") from None
    return found[0] if len(found) == 1 else found


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError
    return int(text)


def locate(name: str) -> Path:
    """The file or folder of CLIP weights that a path or a name stands for; nothing is downloaded.

    Raises:
        InputError: when nothing is there.
    """
    from vidtok.systems.stop.files import find, places

    found = find(name)
    if found is not None:
        return found
    known = places(name)
    looked = f" or {known[0].name} in ., modules, ~/.cache/clip" if known else ""
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
    model = _read(lambda: load(place, **values), "weights of a CLIP", place)
    if options.init_model is not None:
        _init(model, Path(options.init_model))
    elif getattr(model, "untrained", False) and not options.do_train:
        warnings.warn(
            f"the prompts of {model.config.temporal_prompt} are not trained but random; --temporal_prompt none scores "
            "a CLIP as it is",
            stacklevel=2,
        )
    return model


def _read(load: Callable[[], Any], what: str, place: Path) -> Any:
    """What ``load`` returns; what it raises about a damaged file in one sentence."""
    try:
        return load()
    except Exception as error:  # every format has errors of its own
        if isinstance(error, ValueError) and str(error).startswith("expected "):
            raise
        raise InputError(
            f"expected {what}, got {place.name!r}, which does not load ({one_line(error, 160)})"
        ) from error


def _init(model: Any, path: Path) -> None:
    from vidtok.systems.stop import read

    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"expected --init_model as weights, got {path.name!r}, which has none")
    state, own = _read(lambda: read(file), "--init_model as weights", path), model.state_dict()
    wrong = [f"{k} missing" for k in own if k not in state] + [f"{k} unknown" for k in state if k not in own]
    wrong += [f"{k} of another shape" for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise InputError(
            f"expected --init_model with the model's own keys, got {len(wrong)} others: {', '.join(wrong[:10])}"
        )
    model.load_state_dict(state)


def check_fit(model: Any, words: Words) -> None:
    """Refuse captions longer than the model's context, and ids that it has not."""
    sizes = getattr(model, "sizes", None)
    if sizes is None:
        return
    if words.max_words > sizes.context:
        raise InputError(f"expected --max_words of at most {sizes.context}, as the model has, got {words.max_words}")
    if len(words.tokenizer) > sizes.vocabulary:
        raise InputError(f"expected a tokenizer of at most {sizes.vocabulary} ids, got one of {len(words.tokenizer)}")
    end, last = words.tokenizer.eos_token_id, max(words.tokenizer.get_vocab().values())
    if end != last:
        # The text tower reads the largest id of a row, as CLIP does.
        raise InputError(f"expected a tokenizer whose end token has its largest id, {last}, got {end}")


def save(accelerator: Any, model: Any, words: Words, folder: Path, scores: Mapping[str, Any] | None = None) -> None:
    """Write a model and its tokenizer as ``--pretrained_clip_name`` takes them, and its scores, whole or not at all."""
    if accelerator.is_main_process:
        from vidtok.systems.stop import CLIP4Clip
        from vidtok.systems.stop import save as write

        own = accelerator.unwrap_model(model)
        with whole(folder) as new:
            if isinstance(own, CLIP4Clip):
                write(own, new)
                words.tokenizer.save_pretrained(str(new))
            if scores is not None:
                write_scores(scores, new)
    accelerator.wait_for_everyone()


def plain(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as values that JSON has."""
    return {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in scores.items()}


def write_scores(scores: Mapping[str, Any], folder: Path) -> None:
    """Write ``metrics.json``."""
    (folder / "metrics.json").write_text(json.dumps(plain(scores), indent=2) + "\n", encoding="utf-8")


def read_best(folder: Path) -> float:
    """Text to video R@1 of the model that :func:`save` left with its scores; -1 where there is none."""
    try:
        return float(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["text_to_video"]["R@1"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1.0
