"""Memory of one training step, in a process of its own: what autograd keeps, and the peak."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.row import Row
from bench.vision.measure import Rows
from bench.vision.model import Shape, build, images


@contextlib.contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, those of parameters apart; a storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def step_bytes(shape: Shape, batch: int, r: int, device: torch.device) -> tuple[int, float]:
    """Bytes that a forward keeps for its backward, and the peak of both beyond weights, gradients and images."""
    import vidtok
    from bench.memory import _forget_peak, _status_mib

    model = build(shape, device, torch.float32).train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with contextlib.ExitStack() as stack:
        if r:
            stack.enter_context(vidtok.attach(model, vision=f"tome:r={r}"))
        model(images(shape, 1, device, torch.float32)).pooler_output.sum().backward()  # threads and code pages
        pixels = images(shape, batch, device, torch.float32)
        with saved_bytes(model) as seen:
            out = model(pixels).pooler_output
        saved = sum(seen.values())
        del out
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(pixels).pooler_output.sum().backward()
            return saved, float(torch.cuda.max_memory_allocated(device) - before)
        _forget_peak()
        resident = _status_mib("VmRSS")
        model(pixels).pooler_output.sum().backward()
        return saved, (_status_mib("VmHWM") - resident) * 2**20


def _child(shape: Shape, batch: int, r: int, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    pipe.send(step_bytes(shape, batch, r, torch.device("cpu")))


def training_step(shape: Shape, batch: int, r: int, device: torch.device, threads: int) -> tuple[int, float]:
    """:func:`step_bytes`, in a process of its own on a CPU."""
    if device.type == "cuda":
        return step_bytes(shape, batch, r, device)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(shape, batch, r, threads, sender))
    process.start()
    sender.close()
    try:
        found: tuple[int, float] = receiver.recv()
        return found
    finally:
        process.join()


def measure(shape: Shape, batch: int, merges: tuple[int, ...], rows: Rows, device: torch.device) -> list[Row]:
    """What is saved and the peak, as shares of the plain tower's; the target is the share of tokens in the MLPs."""
    threads = int(rows.shared["threads"])
    plain = training_step(shape, batch, 0, device, threads)
    out = []
    for r in merges:
        share = shape.mlp_tokens(r) / shape.mlp_tokens(0)
        name = f"training {shape.name}, batch {batch}, fp32, r={r}, {share:.3g} of the tokens in MLPs"
        got = training_step(shape, batch, r, device, threads)
        for i, label in enumerate(("saved for backward", "peak of a step")):
            value = got[i] / plain[i]
            bound = share if i else None
            out.append(rows.row(name, label, "of plain", (value,) * 3, 1, bytes=float(got[i]), bound=bound, upper=True))
    return out
