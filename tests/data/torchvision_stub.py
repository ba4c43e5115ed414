"""A folder that stands for torchvision where the Hugging Face video processors only need its arithmetic.

No torchvision wheel imports beside a CPU build of torch, and the processors refuse to run without one. Their own
code (sizes, padding, fused normalisation, patch order) runs on these two functions.
"""

from __future__ import annotations

from pathlib import Path

_FUNCTIONAL = """
import torch
from enum import Enum


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def resize(image, size, interpolation=None, max_size=None, antialias=True):
    size = list(size)
    if list(image.shape[-2:]) == size:
        return image
    mode = getattr(interpolation, "value", "bicubic")
    flat = image.reshape(-1, *image.shape[-3:])
    out = torch.nn.functional.interpolate(flat, size=size, mode=mode, align_corners=False, antialias=antialias)
    return out.reshape(*image.shape[:-2], *size)


def normalize(image, mean, std, inplace=False):
    mean = torch.as_tensor(mean, dtype=image.dtype).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=image.dtype).view(-1, 1, 1)
    return image.sub(mean).div_(std)


def grayscale_to_rgb(image):
    assert image.shape[-3] == 3
    return image


pil_to_tensor = None
"""


def install(folder: Path) -> Path:
    """Write the package and its metadata into ``folder``, which then goes on PYTHONPATH."""
    package = folder / "torchvision"
    v2 = package / "transforms" / "v2"
    v2.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.28.0'\nfrom . import io, transforms\n")
    (package / "io.py").write_text("ImageReadMode = decode_image = None\n")
    (v2 / "__init__.py").write_text("from . import functional\nfrom .functional import InterpolationMode\n")
    for path in (package / "transforms" / "functional.py", v2 / "functional.py"):
        path.write_text(_FUNCTIONAL)
    (package / "transforms" / "__init__.py").write_text("from . import v2\nfrom .v2 import InterpolationMode\n")
    info = folder / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return folder
