"""STOP's tower with merging, frame by frame and in loops, over whole frames with their prompts inside."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.merge.reference import attention, merge
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
    return sharpen(tiny(40, 8, layers=layers, temporal_prompt=temporal_prompt, seed=0, **options)).eval()


def clips(batch: int = 2, frames: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, frames, 3, 40, 40, generator=torch.Generator().manual_seed(seed))


def heads(attn, x: Tensor) -> list[Tensor]:
    """Queries, keys and values ``[H, T, D]`` of ``[T, C]``."""
    parts = (x @ attn.in_proj_weight.t() + attn.in_proj_bias).chunk(3, -1)
    return [part.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for part in parts]


def attend(block, query: Tensor, keys: Tensor, size: Tensor) -> Tensor:
    q, (_, k, v) = heads(block.attn, query)[0], heads(block.attn, keys)
    out = attention(q, k, v, size, q.shape[-1] ** -0.5)
    return block.attn.out_proj(out.transpose(0, 1).flatten(1))


@torch.no_grad()
def tower(model: CLIP4Clip, video: Tensor, merges: list[int], prop_attn: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The embedding of one video ``[T, 3, H, W]``, and the sizes of each frame's class token and patches."""
    visual, stop = model.clip.visual, model.stop
    if stop.pixels is not None:
        video = stop.pixels(video[None])[0]
    patches = visual.patches(video)
    between = None if stop.between is None else stop.between(patches[None])[0]
    prompts = stop.prompts.frame.shape[1]
    blank = patches.new_full((prompts, patches.shape[-1]), float("nan"))
    frames = [torch.cat([x[:1], blank, x[1:]]) for x in visual.prepare(patches)]
    size = [torch.ones(x.shape[0]) for x in frames]
    shared = stop.prompts.video
    for index, block in enumerate(visual.transformer.blocks):
        for t, x in enumerate(frames):
            own = stop.prompts.frame[index] + (0 if between is None else between[t])
            frames[t] = torch.cat([x[:1], own, x[1 + prompts :]])
        weight = size if prop_attn else [torch.ones_like(s) for s in size]
        ones = torch.ones(shared.shape[0])
        everything = torch.cat([shared, *frames])
        out = attend(block, block.ln_1(shared), block.ln_1(everything), torch.cat([ones, *weight]))
        after = []
        for t, x in enumerate(frames):
            keys = torch.cat([shared, x])
            metric = heads(block.attn, block.ln_1(x))[1].mean(0)
            y = x + attend(block, block.ln_1(x), block.ln_1(keys), torch.cat([ones, weight[t]]))
            y, size[t] = merge(y, metric, size[t], merges[index], 1 + prompts)
            after.append(y)
        shared, frames = shared + out, after

        def feed(x: Tensor, block=block, index=index) -> Tensor:
            return block.feed(x) + (stop.adapters[index](x) if len(stop.adapters) else 0)

        shared, frames = feed(shared), [feed(x) for x in frames]
    return visual.project(shared[0]), [torch.cat([s[:1], s[1 + prompts :]]) for s in size]
