"""STOP's vision tower (its prompts without the modules on pixels) against the published form, and what merging adds.

The published form is our own writing of what was published: keys and values are projected once for the frames and once
more for the prompts of the video, the keys of the frames are gathered in a loop over them, every layer is computed
whole. Ideals are those of its operations (:func:`macs`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.decoder.measure import ratios
from bench.row import Row
from bench.vision.measure import Rows, rounds
from bench.vision.model import DTYPES

MERGES = (0, 2, 4)


@dataclass(frozen=True)
class Video:
    """A tower, how many videos of how many frames, a dtype, and about how long its rounds may take."""

    image: int
    patch: int
    width: int
    layers: int
    heads: int
    batch: int
    frames: int
    dtype: str
    seconds: float

    def __str__(self) -> str:
        return f"STOP ViT-B/{self.patch}, {self.batch}×{self.frames} frames, {self.dtype}"


def macs(v: Video, r: int, shared: int = 4, prompts: int = 4, adapter: int = 32) -> float:
    """Multiply-adds of one video in the published form in which every frame merges ``r`` patches a layer."""
    c, patches = v.width, (v.image // v.patch) ** 2
    n = 1 + prompts + patches
    total = float(v.frames * patches * c * 3 * v.patch**2)
    for _ in range(v.layers):
        keys = shared + v.frames * n
        total += 2 * v.frames * (n + (n + shared)) * c * c + 2 * v.frames * n * (n + shared) * c
        total += 2 * (shared + keys) * c * c + 2 * shared * keys * c
        n -= min(r, (n - 1 - prompts) // 2)
        total += (8 * c + 2 * adapter) * c * (shared + v.frames * n)
    return total


def _attend(attn: Any, query: Tensor, keys: Tensor) -> Tensor:
    out, _ = F.multi_head_attention_forward(
        query, keys, keys, attn.width, attn.heads, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0,
        attn.out_proj.weight, attn.out_proj.bias, training=False, need_weights=False,
    )  # fmt: skip
    return out


def published(model: Any, video: Tensor) -> Tensor:
    """``[B, T, 3, H, W]`` to the embeddings ``[B, E]`` of the first prompt of each video."""
    visual, stop = model.clip.visual, model.stop
    batch, frames = video.shape[:2]
    shared, prompts = stop.prompts.video.shape[0], stop.prompts.frame.shape[1]
    x = visual.prepare(visual.patches(video.flatten(0, 1)))
    width = x.shape[-1]
    # Token-major: the prompts of the video, then slot after slot of all frames.
    x = x.view(batch, frames, -1, width).permute(2, 1, 0, 3).reshape(-1, batch, width)
    g = stop.prompts.video[:, None].expand(-1, batch, -1).to(x.dtype)
    blank = x.new_zeros(prompts * frames, batch, width)
    x = torch.cat([g, x[:frames], blank, x[frames:]])
    for layer, block in enumerate(visual.transformer.blocks):
        own = stop.prompts.frame[layer].to(x.dtype)[:, None, None].expand(-1, frames, batch, -1)
        head = shared + frames
        x = torch.cat([x[:head], own.reshape(-1, batch, width), x[head + prompts * frames :]])
        h = block.ln_1(x)
        each = h[shared:].reshape(-1, frames * batch, width)
        keys = h.new_zeros(shared + each.shape[0], frames * batch, width)
        for t in range(frames):
            part = slice(t * batch, (t + 1) * batch)
            keys[:, part] = torch.cat([h[:shared], each[:, part]])
        inside = _attend(block.attn, each, keys).reshape(-1, batch, width)
        x = x + torch.cat([_attend(block.attn, h[:shared], h), inside])
        x = block.feed(x) + (stop.adapters[layer](x) if len(stop.adapters) else 0)
    return visual.project(x[0])


def build(v: Video) -> Any:
    """The retrieval model with the prompts of a video and of its frames."""
    from vidtok.systems.stop import CLIP4Clip, Sizes

    torch.manual_seed(0)
    sizes = Sizes(v.image, v.patch, v.width, v.layers, v.heads, text_width=64, text_layers=1, text_heads=1)
    model = CLIP4Clip(None, sizes, {"temporal_prompt": "DGL", "max_frames": v.frames}).eval()
    return model.to(DTYPES[v.dtype])


def measure(v: Video, rows: Rows, device: torch.device) -> list[Row]:
    """Ours against the published form before any merging, and merging against ours without."""
    plain = build(v).to(device)
    shared = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(v.batch, v.frames, 3, v.image, v.image, generator=generator).to(device, DTYPES[v.dtype])
    sides: dict[str, Any] = {"published": lambda: published(plain, video)}
    for r in MERGES:
        model = copy.deepcopy(plain, dict(shared))
        model.set_tome(r)
        sides[f"vidtok {r}"] = lambda model=model: model.stop(model.clip.visual, video, model.tome)[0]
    with torch.inference_mode():
        near = torch.nn.functional.cosine_similarity(sides["published"]().float(), sides["vidtok 0"]().float()).min()
        if not near > (0.9999 if v.dtype == "fp32" else 0.99):
            raise AssertionError(f"expected the published embedding of {v}, got one with a cosine of {near:.4f}")
        for r in MERGES[1:]:
            sides[f"vidtok {r}"]()
        times = rounds(sides, v.seconds, device)
    n, made = len(times["published"]), []
    saved = ratios(times["published"], times["vidtok 0"])
    made.append(rows.row(f"{v}, r=0", "over published", "×", saved, n, bound=1.15))
    for r in MERGES[1:]:
        ideal, name = macs(v, 0) / macs(v, r), f"{v}, r={r}"
        speedup = ratios(times["vidtok 0"], times[f"vidtok {r}"])
        made.append(rows.row(name, "speed-up", "×", speedup, n, bound=1.0, speedup=ideal))
        made.append(rows.row(name, "of the ideal", "×", tuple(s / ideal for s in speedup), n, bound=0.9))
        over = ratios(times["published"], times[f"vidtok {r}"])
        made.append(rows.row(name, "over published", "×", over, n))
    return made


CASES = tuple(Video(224, 32, 768, 12, 12, 2, 12, dtype, 20) for dtype in ("fp32", "bf16"))
TINY = Video(64, 16, 64, 3, 4, 2, 3, "fp32", 0.1)
