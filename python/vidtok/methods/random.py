"""Random sampling of tokens, the second baseline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidtok._constant import held
from vidtok.methods import _common
from vidtok.methods._common import Grid, GridLike, Method
from vidtok.methods.uniform import check as check_share
from vidtok.methods.uniform import count as count_share
from vidtok.plan import Plan


def check(ratio: float | None = None, k: int | None = None, seed: int = 0) -> None:
    """Refuse options outside their range."""
    check_share(ratio, k)
    _common.check_int("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"expected seed below 2**63, got {seed}")


def count(grid: Grid, ratio: float | None = None, k: int | None = None, seed: int = 0) -> int:
    """Tokens kept of a video of ``grid``."""
    return count_share(grid, ratio, k)


def random(
    features: Tensor, grid_thw: GridLike, *, ratio: float | None = None, k: int | None = None, seed: int = 0
) -> Plan:
    r"""Keep tokens of each video drawn without replacement, in ascending order.

    A CPU generator is made anew from ``seed`` for each video, so that a video in a batch keeps the
    tokens that it keeps alone, on any device, and the global generator is not touched.

    Args:
        features: ``[N, C]`` fp32, bf16 or fp16, packed videos; only the count is used.
        grid_thw: ``[V, 3]`` token grids (frames, rows, columns).
        ratio: share kept, in (0, 1]; ``max(1, int(ratio·n))`` tokens of each video.
        k: tokens kept of each video, instead of ``ratio``; a video with fewer stays whole.
        seed: seed of the draw.

    Returns:
        A gather :class:`~vidtok.Plan` of V sequences whose counts are known on the host.

    Raises:
        ValueError: for options outside their range or grids that do not cover ``features``.

    Example:
        >>> random(torch.zeros(10, 4), [(1, 2, 5)], k=3).num_out
        3
    """
    check(ratio, k, seed)
    features, videos = _common.inputs(features, grid_thw)
    lengths = [_common.tokens(g) for g in videos]
    kept = [count(g, ratio, k) for g in videos]
    if features.is_cuda and not torch.compiler.is_compiling():
        return _common.gather(held(_drawn_once(tuple(lengths), tuple(kept), seed, features.device)), lengths, kept)
    return _common.gather(_drawn(lengths, kept, seed).to(features.device), lengths, kept)


def _drawn(lengths: Sequence[int], kept: Sequence[int], seed: int) -> Tensor:
    """Packed indices of the tokens kept, on the CPU."""
    parts, base = [torch.zeros(0, dtype=torch.int64)], 0
    for n, m in zip(lengths, kept):
        generator = torch.Generator("cpu").manual_seed(seed)
        parts.append(torch.randperm(n, generator=generator)[:m].sort().values + base)
        base += n
    return torch.cat(parts)


@lru_cache(maxsize=64)
def _drawn_once(lengths: tuple[int, ...], kept: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The same on a GPU, where each call would have to upload them and wait."""
    return _drawn(lengths, kept, seed).to(device)


METHOD = Method(
    "random",
    random,
    check,
    count,
    {"ratio": "float", "k": "int", "seed": "int"},
    {"ratio": None, "k": None, "seed": 0},
    needs_grid=False,
)
