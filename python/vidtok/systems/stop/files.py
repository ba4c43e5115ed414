"""Checkpoint files."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidtok import _check
from vidtok.systems.stop.config import Config, Sizes
from vidtok.systems.stop.model import CLIP4Clip

#: Names of the original release and where transformers has the same weights.
NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a file: safetensors, a pickle of tensors alone, or a TorchScript archive of CLIP's release."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("state_dict", found) if isinstance(found, dict) else found


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=["config.json", weights]))
            # Not every repository of OpenAI's has safetensors.
            if (folder / weights).exists():
                break
        return folder
    except Exception as error:
        raise ValueError(
            f"expected a path, one of {', '.join(NAMES)} or a repository of the Hugging Face hub that can be reached, "
            f"got {name!r} ({type(error).__name__})"
        ) from error


def _locate(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path
    own = Path.home() / ".cache" / "clip" / f"{name.replace('/', '-').replace('@', '-')}.pt"
    if name in NAMES:
        return own if own.exists() else _download(NAMES[name])
    if name.count("/") != 1 or path.is_absolute() or path.suffix in _SUFFIXES:
        _check.fail(f"a path that exists, or one of {', '.join(NAMES)}", repr(name))
    return _download(name)


def load(name_or_path: str | os.PathLike[str], **config: Any) -> CLIP4Clip:
    """A retrieval model from weights of CLIP or from what :func:`save` wrote.

    Args:
        name_or_path: a file, a directory with ``config.json`` and ``model.safetensors``, a name of the
            original release (``"ViT-B/32"``: ``~/.cache/clip`` first, then the Hugging Face hub), or a
            repository of the hub.
        config: fields of :class:`Config`; those of a saved model change what it was saved with.

    Raises:
        ValueError: a name that is not known, keys that are missing or unexpected.

    Example:
        >>> model = load("ViT-B/32", temporal_prompt="DGL", tome_r=2)  # doctest: +SKIP
    """
    path = _locate(os.fspath(name_or_path))
    if not path.is_dir():
        return CLIP4Clip(None, read(path), Config.of(None, **config))
    weights = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
    if weights is None:
        _check.fail(f"{' or '.join(_WEIGHTS)} in {path}", "neither")
    about = json.loads((path / "config.json").read_text()) if (path / "config.json").exists() else {}
    if "stop" in about:
        return CLIP4Clip(None, read(weights), Config.of(about["stop"], **config))
    heads = {
        f"{ours}_heads": about[f"{ours}_config"].get("num_attention_heads")
        for ours in ("vision", "text")
        if f"{ours}_config" in about
    }
    return CLIP4Clip(None, read(weights), Config.of(heads, **config))


def save(model: CLIP4Clip, directory: str | os.PathLike[str]) -> None:
    """Write ``model.safetensors`` and ``config.json``, which :func:`load` reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = {"stop": asdict(model.config), "sizes": asdict(model.sizes)}
    (directory / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / _WEIGHTS[0])


def tiny(
    image: int = 32,
    patch: int = 8,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    *,
    context: int = 32,
    vocabulary: int = 512,
    text_width: int = 64,
    text_layers: int = 2,
    text_heads: int = 4,
    embed: int = 32,
    seed: int | None = None,
    **config: Any,
) -> CLIP4Clip:
    """A randomly initialised model of any size, for tests and for training from scratch.

    Args:
        image, patch, width, layers, heads: of the vision tower, in pixels and channels.
        context, vocabulary, text_width, text_layers, text_heads: of the text tower.
        embed: channels of the embeddings.
        seed: of the weights; the process's random state is used when None.
        config: fields of :class:`Config`.

    Example:
        >>> tiny(image=64, patch=16, temporal_prompt="DGL", tome_r=1).sizes.grid
        4
    """
    sizes = Sizes(image, patch, width, layers, heads, context, vocabulary, text_width, text_layers, text_heads, embed)
    if seed is None:
        return CLIP4Clip(None, sizes, Config.of(None, **config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP4Clip(None, sizes, Config.of(None, **config))
