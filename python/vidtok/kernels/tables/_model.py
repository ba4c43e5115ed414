"""The cost model: what one launch costs, and how candidates are listed.

A launch of ``blocks`` blocks runs in waves over the ``slots = sms · resident`` places for a block. Of each wave

- memory takes ``bytes / rate`` with ``rate = min(bandwidth, in flight / LATENCY, active SMs · SM_SHARE ·
  bandwidth / sms)``: Little's law over the bytes that all its threads keep in flight, and one SM's share;
- the L2 cache takes ``l2 / (L2_RATE · bandwidth)``;
- arithmetic takes ``work of the fullest SM / (rate / sms · min(1, warps there / FULL_WARPS))``;
- ``chain`` is what one block does in series (dependent loads, barriers, steps of a scan).

The ``b`` blocks of an SM fill each other's waits, so that of the shorter of ``shared = max(memory, L2, arithmetic)``
and ``chain`` one b-th shows: a wave takes ``max(shared, chain) + min(shared, chain) / b``. Time of a launch =
``gpu.launch + Σ waves``; of a call, the sum over its launches. The model ranks candidates; its seconds are an
estimate, and ``vidtok tune`` reports how well the ranks agree with a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vidtok.kernels.tables.gpus import Gpu, occupancy

LATENCY = 0.6e-6  # of a load from memory, seconds
L2_RATE = 2.5  # bandwidth of the L2 cache over that of memory
SM_SHARE = 2.0  # the most that one SM draws, over its even share of the bandwidth
FULL_WARPS = 8  # warps that keep the arithmetic units of one SM busy
BARRIER = 25e-9  # of a block of one warp
BARRIER_WARP = 1.5e-9  # for each further warp
CYCLE = 0.65e-9  # one clock

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
Shape = Mapping[str, int]
Knobs = dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """One set of knobs: why it is ruled out, or None and what limits its blocks per SM."""

    knobs: Knobs
    rejected: str | None
    limit: str


@dataclass(frozen=True)
class Work:
    """One launch as the model sees it; ``bytes``, ``l2`` and ``flops`` are of the whole launch."""

    blocks: int
    threads: int
    registers: int
    shared: int
    bytes: float
    flight: float  # bytes that each thread keeps in flight
    flops: float = 0.0
    tensor: bool = False
    l2: float = 0.0
    chain: float = 0.0
    name: str = "kernel"


def size(dtype: str) -> int:
    """Bytes of one element."""
    return SIZES.get(dtype, 4)


def up(value: int, low: int, high: int) -> int:
    """The smallest power of two at or above ``value``, between ``low`` and ``high``."""
    return min(high, max(low, 1 << max(0, value - 1).bit_length()))


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def barrier(threads: int) -> float:
    """Seconds of one barrier of a block."""
    return BARRIER + BARRIER_WARP * (threads // 32) if threads > 32 else 0.0


def obstacle(gpu: Gpu, work: Work) -> str | None:
    """Why a launch does not fit the GPU, in numbers; None where it does."""
    if work.shared > gpu.shared_block:
        return f"{work.name} needs {work.shared} bytes of shared memory per block, sm_{gpu.sm} has {gpu.shared_block}"
    if work.registers > 255:
        return f"{work.name} needs {work.registers} registers per thread of the 255 there are"
    blocks, limit = occupancy(gpu, work.threads, work.registers, work.shared)
    if blocks == 0:
        per_block = -(-work.registers * 32 // 256) * 256 * (work.threads // 32)
        have, need = {
            "registers": (gpu.registers_sm, per_block),
            "threads": (gpu.threads_sm, work.threads),
        }.get(limit, (gpu.shared_sm, work.shared))
        return f"{work.name} needs {need} {limit} per block, an SM of sm_{gpu.sm} has {have}"
    return None


def limit(gpu: Gpu, work: Work) -> str:
    """What binds a launch, in words: blocks per SM and the resource that keeps it from more."""
    blocks, name = occupancy(gpu, work.threads, work.registers, work.shared)
    if work.blocks < blocks * gpu.sms:
        return f"size: {work.blocks} blocks for {blocks} per SM on {gpu.sms} SMs ({name})"
    return f"{name}: {blocks} blocks per SM ({work.threads} threads, {work.registers} registers, {work.shared} bytes)"


def _wave(gpu: Gpu, work: Work, blocks: int) -> float:
    part = blocks / work.blocks
    share = gpu.bandwidth / gpu.sms
    rate = min(gpu.bandwidth, blocks * work.threads * work.flight / LATENCY, min(blocks, gpu.sms) * SM_SHARE * share)
    memory = work.bytes * part / rate if work.bytes else 0.0
    l2 = work.l2 * part / min(L2_RATE * gpu.bandwidth, min(blocks, gpu.sms) * SM_SHARE * L2_RATE * share)
    fullest = ceil(blocks, gpu.sms)
    busy = min(1.0, fullest * (work.threads // 32) / FULL_WARPS)
    peak = (gpu.tensor16 if work.tensor else gpu.fp32) / gpu.sms * busy
    shared = max(memory, l2, fullest * work.flops / work.blocks / peak)
    return max(shared, work.chain) + min(shared, work.chain) / fullest


def launch_seconds(gpu: Gpu, work: Work) -> float:
    """Modelled time of one launch; it must fit the GPU."""
    resident, _ = occupancy(gpu, work.threads, work.registers, work.shared)
    slots = resident * gpu.sms
    waves, rest = divmod(max(1, work.blocks), slots)
    total = waves * _wave(gpu, work, slots) if waves else 0.0
    return gpu.launch + total + (_wave(gpu, work, rest) if rest else 0.0)


Works = Sequence[Work] | str


def total(gpu: Gpu, works: Works) -> float:
    """Modelled time of a call; infinite where a launch does not fit."""
    if isinstance(works, str) or any(obstacle(gpu, work) for work in works):
        return float("inf")
    return sum(launch_seconds(gpu, work) for work in works)


def spread(knobs: Mapping[str, Sequence[int]]) -> Iterator[Knobs]:
    """Every combination of knob values, the first knob slowest."""
    for values in itertools.product(*knobs.values()):
        yield dict(zip(knobs, values))


def listed(
    gpu: Gpu, dtype: str, knobs: Mapping[str, Sequence[int]], works: Callable[[Knobs], Works]
) -> list[Candidate]:
    """Every combination, each with why it is ruled out or what limits it."""
    out = []
    for chosen in spread(knobs):
        launches = works(chosen)
        why = misfit(gpu, dtype, launches)
        bound = ""
        if why is None and not isinstance(launches, str):
            # The launch that takes longest says what limits the call.
            bound = limit(gpu, max(launches, key=lambda work: launch_seconds(gpu, work)))
        out.append(Candidate(chosen, why, bound))
    return out


def misfit(gpu: Gpu, dtype: str, works: Works) -> str | None:
    """Why a call's launches do not fit a GPU, in numbers; None where they do."""
    if gpu.sm < 80 and dtype == "bfloat16":
        return f"sm_{gpu.sm} has no bfloat16 arithmetic, sm_80 is the first that has"
    if isinstance(works, str):
        return works
    return next(filter(None, (obstacle(gpu, work) for work in works)), None)


Launches = Callable[[str, Gpu, str, Shape, Knobs], Works]


def timer(works: Launches) -> Callable[[str, Gpu, str, Shape, Knobs], float]:
    """The function ``seconds(backend, gpu, dtype, shape, knobs)`` of an operator: modelled time of a call."""

    def seconds(backend: str, gpu: Gpu, dtype: str, shape: Shape, knobs: Knobs) -> float:
        return total(gpu, works(backend, gpu, dtype, shape, knobs))

    return seconds


def lister(
    works: Launches, knobs: Mapping[str, Mapping[str, Sequence[int]]]
) -> Callable[[str, Gpu, str, Shape], list[Candidate]]:
    """The function ``candidates(backend, gpu, dtype, shape)`` of an operator: every set of knobs."""

    def candidates(backend: str, gpu: Gpu, dtype: str, shape: Shape) -> list[Candidate]:
        return listed(gpu, dtype, knobs[backend], lambda chosen: works(backend, gpu, dtype, shape, chosen))

    return candidates
