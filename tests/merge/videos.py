"""Merging across frames written with loops, one video at a time: what :mod:`vidtok.merge.frames` is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.merge import reference

FILL = 2.0**-120


@dataclass
class Clip:
    """Tokens ``[n, C]``, what each weighs, which frame token each holds, and how many class tokens are in front."""

    x: Tensor
    size: Tensor
    prefix: int


def _join(clips: list[Clip], vectors: Tensor | None, cross: float, numbers: list[int]) -> Clip:
    prefix = sum(clip.prefix for clip in clips)
    shifts = [0 if vectors is None or n < 0 else vectors[n] for n in numbers]

    def line_up(parts: list[Tensor]) -> Tensor:
        heads = [part[: clip.prefix] for part, clip in zip(parts, clips, strict=True)]
        return torch.cat(heads + [part[clip.prefix :] for part, clip in zip(parts, clips, strict=True)])

    x, size = line_up([clip.x for clip in clips]), line_up([clip.size for clip in clips])
    r = int(cross * x.shape[0])
    if r == 0:
        return Clip(x, size, prefix)
    shifted = line_up([clip.x + shift for clip, shift in zip(clips, shifts, strict=True)])
    return Clip(*reference.merge(shifted, x.detach(), size, r, prefix), prefix)


def by_loops(layers: list[Any], own: Any, frames: Tensor, options: Any, positions: Any = None) -> list[Clip]:
    """The clips of one video, whose ``frames`` are ``[T, n, C]``, behind the last of ``layers``.

    ``own`` has ``heads(layer, x) -> q, k, v [H, n, D]``, ``close(layer, x, heads) -> x`` and ``feed(layer, x) -> x``.
    """
    clips = [Clip(x, torch.ones(x.shape[0]), own.prefix) for x in frames]
    joins = dict(zip(options.merge_layers, options.merge_frames, strict=True))
    early = options.schedule.wanted(len(layers), 0)
    for i, layer in enumerate(layers):
        group = min(joins.get(i, 1), len(clips))
        if group > 1:
            vectors = None if positions is None else positions.levels[options.merge_layers.index(i)]
            joined = []
            for start in range(0, len(clips), group):
                part = clips[start : start + group]
                numbers = list(range(start, start + len(part)))
                while len(part) < group:
                    last = part[-1]
                    part.append(Clip(last.x.detach(), torch.full_like(last.size, FILL), last.prefix))
                    numbers.append(-1)
                joined.append(_join(part, vectors, options.cross, numbers))
            clips = joined
        done = []
        for clip in clips:
            q, k, v = own.heads(layer, clip.x)
            weigh = clip.size if options.prop_attn else clip.size.clamp(max=1)
            x = own.close(layer, clip.x, reference.attention(q, k, v, weigh, q.shape[-1] ** -0.5))
            r = early[i] if i < len(early) else int(options.intra * x.shape[0])
            x, size = reference.merge(x, k.detach().mean(0), clip.size, r, clip.prefix)
            done.append(Clip(own.feed(layer, x), size, clip.prefix))
        clips = done
    return clips


class Mine:
    """The blocks of :mod:`tests.merge.own_vit`."""

    prefix = 1

    def heads(self, block: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in block.heads(x[None]))

    def close(self, block: Any, x: Tensor, heads: Tensor) -> Tensor:
        return x + block.proj(heads.transpose(0, 1).flatten(1))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp(block.norm2(x))


class Clips(Mine):
    """The layers of CLIP and SigLIP."""

    def __init__(self, count: int, prefix: int = 1) -> None:
        self.count, self.prefix = count, prefix

    def heads(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        y, own = layer.layer_norm1(x), layer.self_attn
        return tuple(p(y).unflatten(-1, (self.count, -1)).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))

    def close(self, layer: Any, x: Tensor, heads: Tensor) -> Tensor:
        return x + layer.self_attn.out_proj(heads.transpose(0, 1).flatten(1))

    def feed(self, layer: Any, x: Tensor) -> Tensor:
        return x + layer.mlp(layer.layer_norm2(x))
