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


def find(name: str) -> Path | None:
    """The file or folder of weights that a path or a name stands for; None where nothing is, as nothing is downloaded.

    Names of OpenAI's release are looked for as ``ViT-B-32.pt`` in the working folder, in ``modules`` and in
    ``~/.cache/clip``, and with names of the hub in its local cache.
    """
    if Path(name).exists():
        return Path(name)
    for place in places(name):
        if place.is_file():
            return place
    repository = NAMES.get(name, name)
    if repository.count("/") == 1 and not os.path.isabs(repository):
        from huggingface_hub import try_to_load_from_cache

        # Not every repository of OpenAI's has safetensors.
        for weights in _WEIGHTS:
            try:
                found = try_to_load_from_cache(repository, weights)
            except ValueError:
                return None
            if isinstance(found, str):
                return Path(found).parent
    return None


def places(name: str) -> list[Path]:
    """Where the file of a name of OpenAI's release may lie; nowhere for other names."""
    file = f"{name.replace('/', '-').replace('@', '-')}.pt"
    return [Path(file), Path("modules", file), Path.home() / ".cache" / "clip" / file] if name in NAMES else []


def load(name_or_path: str | os.PathLike[str], **config: Any) -> CLIP4Clip:
    """A retrieval model from weights of CLIP or from what :func:`save` wrote.

    Args:
        name_or_path: a file, a directory with ``config.json`` and ``model.safetensors``, a name of the original
            release (``"ViT-B/32"``: ``ViT-B-32.pt`` in the working folder, ``modules`` or ``~/.cache/clip``, or the
            hub's local cache), or a repository that the hub's local cache holds. Nothing is downloaded.
        config: fields of :class:`Config`; those of a saved model change what it was saved with.

    Raises:
        ValueError: a name that is not known, keys that are missing or unexpected.

    Example:
        >>> model = load("ViT-B/32", temporal_prompt="DGL", tome_r=2)  # doctest: +SKIP
    """
    path = find(os.fspath(name_or_path))
    if path is None:
        held = f"one of {', '.join(NAMES)} or a repository of the hub that this machine holds (nothing is downloaded)"
        _check.fail(f"a path that exists, or {held}", repr(name_or_path))
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
