"""timm and open_clip where they are installed, with torchvision beside a build of torch without CUDA."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch


def load(name: str) -> Any:
    """The package, or the test is skipped."""
    if not torch.version.cuda and importlib.util.find_spec("torchvision") is not None:
        # Its compiled operators are made for CUDA builds; only this module asks for them.
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return pytest.importorskip(name)


def sharpen(model: Any) -> Any:
    """Weights with which masks, sizes and places matter."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            scale = 0.5 if any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj", "latent")) else 0.2
            p.data.normal_(0, scale)
        elif "norm" not in name and "ln_" not in name:
            p.data.normal_(0.1, 0.3)
    return model.eval()


def images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-5 * want.norm()
