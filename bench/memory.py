"""Peak memory that each operator takes beyond its inputs, at 23 328 tokens of 3 584 channels.

They run in a process of their own whose high-water mark is read around each: what torch and the
kernels allocate counts alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.case import nbytes
from bench.row import Row

TOKENS, CHANNELS, FRAMES = 23328, 3584, 32
# Beyond inputs and outputs: the workspace of a call, and what the process itself needs to start threads.
WORKSPACE_MIB, SLACK_MIB = 64, 24


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in /proc/self/status, got none")


def _forget_peak() -> None:
    """Give free memory back and let the high-water mark start again from what is resident."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _merge(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    metric = x[None, :, :64].contiguous()
    return lambda: ops.bipartite_merge(x[None], metric, x.shape[0] // 2)


def _cluster(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    return lambda: ops.cluster_dpc_knn(x, x.shape[0] // 2, k=7)


def _cluster_frames(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    ends = torch.arange(0, x.shape[0] + 1, x.shape[0] // FRAMES, dtype=torch.int32)
    return lambda: ops.cluster_dpc_knn(x, x.shape[0] // FRAMES // 2, k=7, cu_seqlens=ends)


def _attention(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    key = x[:, :512].reshape(1, x.shape[0], 4, 128).transpose(1, 2).contiguous()
    query = torch.ones(1, 28, 1, 128)
    return lambda: ops.attention_topk(query, key, x.shape[0] // 2, span=[(0, 0, x.shape[0])])


def _previous(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    side = round((x.shape[0] / FRAMES) ** 0.5)
    return lambda: ops.adjacent_similarity(x, [(FRAMES, side, side)])


def _pool(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops

    side = round((x.shape[0] / FRAMES) ** 0.5)
    return lambda: ops.pool_packed(x, [(FRAMES, side, side)], level=2)


def _gather(x: torch.Tensor) -> Callable[[], Any]:
    from vidtok import ops
    from vidtok.plan import Plan

    keep, ends = x.shape[0] // 2, [torch.tensor([0, v], dtype=torch.int32) for v in (x.shape[0], x.shape[0] // 2)]
    plan = Plan.gather(torch.arange(0, 2 * keep, 2), *ends, x.shape[0])
    return lambda: ops.plan_apply(plan, x)


def _quadratic(x: torch.Tensor) -> Callable[[], Any]:
    return lambda: (x[:, :8] @ x[:, :8].T).sum()


# What the measure itself is tried on.
CONTROLS = {"quadratic control": _quadratic}
CASES: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
    "bipartite_merge": _merge,
    "cluster_dpc_knn": _cluster,
    "cluster_dpc_knn per frame": _cluster_frames,
    "attention_topk": _attention,
    "adjacent_similarity": _previous,
    "pool_packed": _pool,
    "plan_apply": _gather,
}


def _child(names: list[str], tokens: int, channels: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    cases = {**CASES, **CONTROLS}
    small, large = torch.randn(FRAMES * 9, channels), torch.randn(tokens, 64).repeat(1, channels // 64)
    with torch.no_grad():
        for name in names:
            cases[name](small)()  # threads, imports and code pages
            run = cases[name](large)
            _forget_peak()
            before = _status_mib("VmRSS")
            result = run()
            pipe.send((_status_mib("VmHWM") - before, nbytes(_tensors(result)) / 2**20))
            del run, result


def _tensors(result: Any) -> list[torch.Tensor]:
    """Every tensor of a result, those of a plan included."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in _tensors(part)]
    return [t for t in vars(result).values() if isinstance(t, torch.Tensor)] if hasattr(result, "anchor") else []


def peaks(
    names: Iterable[str], tokens: int = TOKENS, channels: int = CHANNELS, threads: int = 2
) -> Iterator[tuple[str, float, float]]:
    """(name, MiB beyond the inputs at the peak, MiB of the outputs) of each, in one process."""
    names = list(names)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(names, tokens, channels, threads, sender))
    process.start()
    sender.close()
    try:
        for name in names:
            yield name, *receiver.recv()
    finally:
        process.join()


def rows(shared: dict[str, Any]) -> list[Row]:
    """The table of peaks."""
    out = []
    for name, taken, outputs in peaks(CASES, threads=int(shared["threads"])):
        extra = max(0.0, taken - outputs)
        reached = "yes" if extra <= WORKSPACE_MIB + SLACK_MIB else f"no: {extra:.0f} MiB"
        print(f"  {name}: {extra:.0f} MiB beyond inputs and outputs ({outputs:.0f} MiB)", flush=True)
        out.append(
            Row(
                "memory",
                "MiB",
                name,
                f"{TOKENS}×{CHANNELS}",
                "",
                "vidtok",
                "beyond inputs and outputs",
                extra,
                extra,
                extra,
                1,
                target=f"≤ {WORKSPACE_MIB} MiB of workspace",
                reached=reached,
                **shared,
            )
        )
    return out
