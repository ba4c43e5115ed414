"""STOP's tower with merging, frame by frame and in loops, over whole frames with their prompts inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.merge.reference import attention, merge
from vidtok.merge.clips import FILL
from vidtok.systems.stop import CLIP4Clip, tiny


@torch.no_grad()
def sharpen(model: CLIP4Clip) -> CLIP4Clip:
    """Weights with which attention, prompts, adapters and sizes matter."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "in_proj_weight" in name:
            p[: 2 * p.shape[0] // 3] *= 3
        elif ".up." in name:
            p.normal_(0, 0.3, generator=generator)
        elif "prompts" in name:
            p.mul_(40)
        elif "between" in name or "pixels" in name:
            p.mul_(3)
    return model


def make(temporal_prompt: str = "DGL", layers: int = 3, **options) -> CLIP4Clip:
    options = {"prompt_dropout": 0.0, **options}
    return sharpen(tiny(32, 8, 32, layers=layers, temporal_prompt=temporal_prompt, seed=0, **options)).eval()


def clips(batch: int = 2, frames: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def heads(attn, x: Tensor) -> list[Tensor]:
    """Queries, keys and values ``[H, T, D]`` of ``[T, C]``."""
    parts = (x @ attn.in_proj_weight.t() + attn.in_proj_bias).chunk(3, -1)
    return [part.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for part in parts]


def attend(block, query: Tensor, keys: Tensor, size: Tensor) -> Tensor:
    q, (_, k, v) = heads(block.attn, query)[0], heads(block.attn, keys)
    out = attention(q, k, v, size, q.shape[-1] ** -0.5)
    return block.attn.out_proj(out.transpose(0, 1).flatten(1))


@dataclass
class Clip:
    """Frames that attend to each other: class tokens of all, prompts of all, then patches; None is no frame."""

    frames: list[int | None]
    x: Tensor
    size: Tensor

    def rest(self, slots: int) -> slice:
        return slice(len(self.frames) * slots, None)


def joined(clips: list[Clip], count: int, cross: int, slots: int) -> list[Clip]:
    """Every ``count`` neighbours as one, filled up with copies that weigh nothing; ``cross`` tokens merge."""
    count, out = min(count, len(clips)), []
    for start in range(0, len(clips), count):
        group = clips[start : start + count]
        last = group[-1]
        copy = Clip([None] * len(last.frames), last.x, torch.full_like(last.size, FILL))
        group = group + [copy] * (count - len(group))
        frames = [frame for clip in group for frame in clip.frames]
        first = [(clip.x[: len(clip.frames)], clip.size[: len(clip.frames)]) for clip in group]
        rest = [(clip.x[clip.rest(slots)], clip.size[clip.rest(slots)]) for clip in group]
        prompts = [(last.x[:1] * float("nan"), torch.tensor([FILL if frame is None else 1.0])) for frame in frames]
        x, size = (torch.cat(parts) for parts in zip(*first, *(p for p in prompts for _ in range(slots - 1)), *rest))
        if count > 1:
            x, size = merge(x, x, size, cross, len(frames) * slots)
        out.append(Clip(frames, x, size))
    return out


@torch.no_grad()
def tower(
    model: CLIP4Clip,
    video: Tensor,
    merges: list[int],
    prop_attn: bool = True,
    joins: dict[int, tuple[int, int]] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The embedding of one video ``[T, 3, H, W]``, and the sizes of each clip's class tokens and patches."""
    visual, stop = model.clip.visual, model.stop
    if stop.pixels is not None:
        video = stop.pixels(video[None])[0]
    patches = visual.patches(video)
    between = None if stop.between is None else stop.between(patches[None])[0]
    slots = 1 + stop.prompts.frame.shape[1]
    blank = patches.new_full((slots - 1, patches.shape[-1]), float("nan"))
    clips = [
        Clip([t], torch.cat([x[:1], blank, x[1:]]), torch.ones(len(x) + slots - 1))
        for t, x in enumerate(visual.prepare(patches))
    ]
    shared = stop.prompts.video
    for index, block in enumerate(visual.transformer.blocks):
        if joins and index in joins:
            clips = joined(clips, *joins[index], slots)
        for clip in clips:
            n = len(clip.frames)
            own = [stop.prompts.frame[index] + (0 if between is None else between[t or 0]) for t in clip.frames]
            clip.x = torch.cat([clip.x[:n], *own, clip.x[clip.rest(slots)]])
        weight = [clip.size if prop_attn else clip.size.clamp(max=1) for clip in clips]
        ones = torch.ones(shared.shape[0])
        everything = torch.cat([shared, *(clip.x for clip in clips)])
        out = attend(block, block.ln_1(shared), block.ln_1(everything), torch.cat([ones, *weight]))
        for clip, own in zip(clips, weight):
            keys = torch.cat([shared, clip.x])
            metric = heads(block.attn, block.ln_1(clip.x))[1].mean(0)
            y = clip.x + attend(block, block.ln_1(clip.x), block.ln_1(keys), torch.cat([ones, own]))
            clip.x, clip.size = merge(y, metric, clip.size, merges[index], len(clip.frames) * slots)
        shared = shared + out
        shared = feed(model, index, shared)
        for clip in clips:
            clip.x = feed(model, index, clip.x)
    sizes = [torch.cat([c.size[: len(c.frames)], c.size[c.rest(slots)]]) for c in clips]
    return visual.project(shared[0]), sizes


def feed(model: CLIP4Clip, index: int, x: Tensor) -> Tensor:
    stop = model.stop
    return model.clip.visual.transformer.blocks[index].feed(x) + (stop.adapters[index](x) if stop.adapters else 0)
