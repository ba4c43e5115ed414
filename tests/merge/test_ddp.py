"""Merging under data-parallel training: two processes, and shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vidtok
from tests.merge.tempme_models import SMALL, clip, pixels

REPO = Path(__file__).parents[2]

WORK = """
import torch, vidtok
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.merge.test_ddp import Both, loss_of, make
from tests.merge.tempme_models import pixels

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for spec in {specs!r}:
    model, handle = make(spec)
    ddp = DistributedDataParallel(Both(model, handle.vision[0]))
    if not spec.startswith("tempme"):
        handle.restore()
        handle = vidtok.attach(ddp, vision=spec)
    # Two backward passes are averaged, the second into what the first left.
    for _ in range(2):
        loss_of(ddp, pixels(8)[4 * rank : 4 * rank + 4]).backward()
    got = [p.grad for p in ddp.parameters()]
    handle.restore()
    model, handle = make(spec)
    alone = Both(model, handle.vision[0])
    for _ in range(2):
        loss_of(alone, pixels(8)).backward()
    for (name, p), grad in zip(alone.named_parameters(), got, strict=True):
        assert (grad is None) == (p.grad is None), name
        if grad is not None:
            assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-5, (name, grad.norm(), p.grad.norm())
    handle.restore()
dist.destroy_process_group()
print("same", rank)
"""

SHARDS = """
import torch, vidtok
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.merge.tempme_models import clip, pixels, tower

torch.set_num_threads(1)
dist.init_process_group("gloo")
spec = {specs!r}[0]
reference = clip()
with vidtok.attach(reference, vision=spec):
    want = reference(pixels(4)).pooler_output.detach()
plain = reference(pixels(4)).pooler_output.detach()
for first in (True, False):
    model = clip()
    handle = vidtok.attach(model, vision=spec) if first else None
    for layer in tower(model).encoder.layers:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    handle = handle or vidtok.attach(model, vision=spec)
    out = model(pixels(4)).pooler_output
    out.square().mean().backward()
    torch.testing.assert_close(out.detach(), want)
    handle.restore()
    torch.testing.assert_close(model(pixels(4)).pooler_output.detach(), plain)
    with vidtok.attach(model, vision=spec):
        torch.testing.assert_close(model(pixels(4)).pooler_output.detach(), want)
dist.destroy_process_group()
print("same", 0)
"""


class Both(torch.nn.Module):
    """A model and the frame positions beside it, so that both are averaged over processes."""

    def __init__(self, model, merging):
        super().__init__()
        self.model, self.positions = model, getattr(merging, "positions", None)

    def forward(self, x):
        return self.model(x).pooler_output


def make(spec):
    model = clip(3).train()
    return model, vidtok.attach(model, vision=spec)


def loss_of(model, x):
    # The mean over two processes of their means is the mean of the whole.
    return model(x).square().mean()


def run(work: str, specs: list[str]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    parts = []
    for rank in range(2):
        env = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "python"), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, "-c", work.format(specs=specs)]
        parts.append(subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        return [part.communicate(timeout=300)[0].decode() for part in parts]
    finally:
        for part in parts:
            part.kill()


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_the_whole_batch():
    for out in run(WORK, ["tome:r=3", SMALL + ",frame_pos=true"]):
        assert "same" in out, out[-3000:]


@pytest.mark.slow
def test_shards():
    for out in run(SHARDS, ["tome:r=3"]):
        assert "same" in out, out[-3000:]


def test_a_class_derived_from_a_merging_one_outlives_it():
    """As fully_shard does: it derives a class of its own from the one that it meets."""
    model = clip()
    want = model(pixels(4)).pooler_output
    handle = vidtok.attach(model, vision="tome:r=3")
    merged = model(pixels(4)).pooler_output
    layers = [m for m in model.modules() if "_vidtok" in vars(m)]
    for layer in layers:
        layer.__class__ = type("Sharded", (type(layer),), {})
    assert torch.equal(model(pixels(4)).pooler_output, merged)
    handle.restore()
    assert all(type(layer).__name__ == "Sharded" for layer in layers)
    assert torch.equal(model(pixels(4)).pooler_output, want)
    with vidtok.attach(model, vision="tome:r=3"):
        assert torch.equal(model(pixels(4)).pooler_output, merged)
