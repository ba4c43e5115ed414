"""timm and open_clip where they are installed, with torchvision beside a build of torch without CUDA."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import types
from typing import Any

import pytest
import torch

import vidtok
from vidtok.merge import ToMe


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


def check_pool(model: Any, merges: list[int], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``model`` pools weighs by size: without the sizes its output is another."""
    with torch.no_grad():
        with vidtok.attach(model, vision=ToMe(r=merges)):
            want = model(images())
        monkeypatch.setattr(f"vidtok.models.towers.{family}.sizes", lambda merging: None)
        with vidtok.attach(model, vision=ToMe(r=merges)):
            assert (model(images()) - want).norm() > 1e-3 * want.norm()


def check_checkpointing(model: Any, merges: list[int]) -> None:
    """Gradient checkpointing changes no gradient."""
    grads = []
    with vidtok.attach(model.train(), vision=ToMe(r=merges)):
        for on in (False, True):
            model.set_grad_checkpointing(on)
            model.zero_grad()
            # Two passes before the backward one.
            (model(images()).square().mean() + model(2 * images(3)).square().mean()).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def check_copies(model: Any, merges: list[int], kind: type) -> None:
    """Copies and pickles of an attached model are plain ones of class ``kind``."""
    with torch.no_grad():
        want = model(images())
        with vidtok.attach(model, vision=ToMe(r=merges)):
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                assert type(other) is kind
                assert torch.equal(other(images()), want)
