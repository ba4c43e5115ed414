"""Draw which patches of real frames became one token: each takes the mean colour of its patches, with an outline.

    python examples/trace_pictures.py --video clip.mp4 --model FOLDER --vision tome:r=8 --out picture.png

``--model`` is a folder of transformers with a vision tower, or a model that ``vidtok train retrieval`` wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vidtok
from vidtok.data.retrieval.frames import MEAN, STD


def frames(path: Path, count: int, size: int) -> np.ndarray:
    """uint8 ``[count, size, size, 3]``: frames at equal distances, their middle square."""
    import av
    from PIL import Image

    with av.open(str(path)) as video:
        held = [frame.to_image() for frame in video.decode(video=0)]
    out = []
    for i in range(count):
        image = held[(2 * i + 1) * len(held) // (2 * count)]
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        out.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(out)


def owners(plan: Any, batch: int, tokens: int) -> Tensor:
    """int64 ``[batch, tokens]``: the token that each one went into."""
    if plan is None:
        return torch.arange(tokens).expand(batch, -1)
    counts = plan.offset.diff().long()
    place = torch.empty(plan.num_in, dtype=torch.int64)
    place[plan.member.long()] = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return place.view(batch, tokens)


def painted(frame: np.ndarray, owner: Tensor, side: int, scale: int = 3) -> np.ndarray:
    """``frame`` with the mean colour inside each group of patches, and white lines around groups of more than one."""
    size = frame.shape[0]
    cell = size // side
    groups = owner.view(side, side).numpy().repeat(cell, 0).repeat(cell, 1)
    large = frame.repeat(scale, 0).repeat(scale, 1).astype(float)
    inside = groups.repeat(scale, 0).repeat(scale, 1)
    for group in np.unique(groups):
        at = inside == group
        if at.sum() > (cell * scale) ** 2:
            large[at] = large[at].mean(0)
            edge = np.zeros_like(at)
            edge[1:] |= inside[1:] != inside[:-1]
            edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
            large[at & edge] = 255
    return large.astype(np.uint8)


def retrieval_model(folder: Path, spec: str) -> tuple[int, int, Callable[[Tensor], list[Any]]]:
    """Image size, patches along a side, and what gives the plan after each layer."""
    from vidtok.merge.spec import resolve
    from vidtok.systems.stop import load

    model = load(folder).eval()
    model.set_tome(resolve(spec).r, trace_source=True)

    def plans(pixels: Tensor) -> list[Any]:
        model.encode_video(pixels[None])
        return [model.run.plan(stop=i + 1) for i in range(len(model.run.plans) - 1)]

    return model.sizes.image, model.sizes.grid, plans


def tower(folder: Path, spec: str) -> tuple[int, int, Callable[[Tensor], list[Any]]]:
    """The same for a model of transformers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    config = getattr(model.config, "vision_config", model.config)
    handle = vidtok.attach(model, vision=f"{spec},trace=true")
    (merging,) = handle.vision

    def plans(pixels: Tensor) -> list[Any]:
        merging.tower(pixels)
        return [merging.trace(stop=i + 1) for i in range(merging.layers)]

    return config.image_size, config.image_size // config.patch_size, plans


@torch.no_grad()
def picture(video: Path, folder: Path, spec: str, count: int = 4) -> np.ndarray:
    """A row for each frame: the frame, and what each layer leaves of it."""
    about = json.loads((folder / "config.json").read_text())
    size, side, plans = (retrieval_model if "stop" in about else tower)(folder, spec)
    held = frames(video, count, size)
    pixels = torch.from_numpy(held).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    stages = [None, *plans(pixels)]
    tokens = next((plan.num_in // count for plan in stages if plan is not None), side * side + 1)
    # Class and register tokens come first.
    rows = [
        [painted(held[i], owners(plan, count, tokens)[i, -side * side :], side) for plan in stages]
        for i in range(count)
    ]
    white = np.full((rows[0][0].shape[0], 6, 3), 255, np.uint8)
    lines = [np.concatenate([part for one in row for part in (one, white)][:-1], 1) for row in rows]
    gap = np.full((6, lines[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for line in lines for part in (line, gap)][:-1])


def main() -> None:
    """Read the command line."""
    from PIL import Image

    parser = argparse.ArgumentParser(description="Draw which patches became one token.")
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vision", default="tome:r=8")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("trace.png"))
    args = parser.parse_args()
    Image.fromarray(picture(args.video, args.model, args.vision, args.frames)).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
