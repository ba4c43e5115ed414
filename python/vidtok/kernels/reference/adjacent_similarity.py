"""Cosine of tokens with the same slot in other frames, or with a centre."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.reference._numerics import accumulate_dtype, bounds, inverse_norm, round_cosine

MODES = ("previous", "window", "center")


def window_slots(grid_rows: list[list[int]], windows: list[int], total: int) -> int:
    """Number of (segment, slot) pairs, after checking that the segments cover each video."""
    held = sum(t * h * w for t, h, w in grid_rows)
    if held != total:
        _check.fail(f"grid_thw that holds the {total} tokens of x", f"{grid_rows} with {held}")
    out, segment = 0, 0
    for t, h, w in grid_rows:
        covered = 0
        while covered < t and segment < len(windows) and windows[segment] > 0:
            covered += windows[segment]
            out += h * w
            segment += 1
        if covered != t:
            _check.fail(f"window lengths that cover the {t} frames of each video", str(windows))
    if segment != len(windows):
        _check.fail(f"{segment} window lengths over grids {grid_rows}", f"{len(windows)}")
    return out


def adjacent_similarity(
    x: Tensor,
    grid: Tensor,
    mode: int,
    window: Tensor | None,
    center: Tensor | None,
    cu_seqlens: Tensor | None,
    num_out: int,
) -> Tensor:
    """Scores by mode (index into MODES); −inf where no pair exists."""
    acc = accumulate_dtype(x.dtype)
    x32 = x.to(acc)
    inverse = inverse_norm(x32)
    if MODES[mode] == "center":
        assert center is not None
        spans = bounds(cu_seqlens, x.shape[0])
        c32 = center.to(acc)
        c_inverse = inverse_norm(c32)
        parts = [(x32[a:b] @ c32[s]) * inverse[a:b] * c_inverse[s] for s, (a, b) in enumerate(spans)]
        cosine = torch.cat(parts) if parts else x32.new_empty(0)
        return round_cosine(cosine, x.dtype)
    parts, start, segment = [], 0, 0
    windows = [] if window is None else window.tolist()
    for t, h, w in grid.tolist():
        slots = h * w
        stop = start + t * slots
        if stop > x.shape[0]:
            raise IndexError(f"expected grids that hold {x.shape[0]} tokens, got {grid.tolist()}")
        frames = x32[start:stop].view(t, slots, x.shape[1])
        inv = inverse[start:stop].view(t, slots)
        start = stop
        if MODES[mode] == "previous":
            score = frames.new_full((t, slots), -torch.inf)
            dots = (frames[1:] * frames[:-1]).sum(-1)
            score[1:] = round_cosine(dots * inv[1:] * inv[:-1], x.dtype)
            parts.append(score.reshape(-1))
            continue
        unit = frames * inv.unsqueeze(-1)
        f = 0
        while f < t:
            if segment >= len(windows) or windows[segment] < 1 or f + windows[segment] > t:
                raise IndexError(f"expected window lengths that cover the {t} frames of each video, got {windows}")
            n = windows[segment]
            segment += 1
            if n == 1:
                parts.append(unit.new_full((slots,), -torch.inf))
            else:
                here = unit[f : f + n]
                pairs = here.sum(0).square().sum(-1) - (inv[f : f + n] != 0).sum(0)
                parts.append(round_cosine(pairs / (n * (n - 1)), x.dtype))
            f += n
    if segment != len(windows) or start != x.shape[0]:
        raise IndexError(
            f"expected windows and grids that cover {x.shape[0]} tokens, got {windows} over {grid.tolist()}"
        )
    return torch.cat(parts) if parts else x32.new_empty(0)
