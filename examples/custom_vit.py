"""A vision transformer of one's own, plus the lines marked "vidtok", which let its tokens merge.

python examples/custom_vit.py                   # trains for some seconds, then counts tokens against accuracy
python examples/custom_vit.py --merge tome:k=17

The images are noise with a patch of stripes in it; the model says which way the stripes run.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge import attach_any, weighted_mean  # vidtok


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def qkv_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.qkv_heads(self.norm1(x)))
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, classes: int, width: int = 64, depth: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 65, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        self.merging = None  # vidtok

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        mean = x[:, 1:].mean(1)
        if self.merging is not None:  # vidtok
            mean = weighted_mean(x, self.merging.size, skip=1)  # vidtok
        return self.head(mean)


def attend(block: Block, x: Tensor, step) -> Tensor:  # vidtok
    out = step.attention(*block.qkv_heads(block.norm1(x)))  # vidtok
    return x + block.proj(out.transpose(1, 2).flatten(2))  # vidtok


def feed(block: Block, x: Tensor) -> Tensor:  # vidtok
    return x + block.mlp(block.norm2(x))  # vidtok


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 64, 64, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    stripes = torch.stack([row, column, row + column, row - column]).mul(0.8).sin().mul(2)
    for image, label in zip(images[:, 0], labels, strict=True):
        top, left = torch.randint(41, (2,), generator=generator).tolist()
        image[top : top + 24, left : left + 24] += stripes[label]
    return images, labels


@torch.no_grad()
def accuracy(model: ViT) -> tuple[float, float]:
    images, labels = batch(256, seed=-1)
    model(images[:32])
    start = time.perf_counter()
    said = torch.cat([model(part).argmax(1) for part in images.split(32)])
    return (said == labels).float().mean().item(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--merge", nargs="+", default=["tome:r=4", "tome:r=8"], help="how to merge")  # vidtok
    args = parser.parse_args()
    torch.manual_seed(0)
    model = ViT(classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(args.steps):
        images, labels = batch(32, seed=step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    share, seconds = accuracy(model)
    print(f"plain: accuracy {share:.3f}, {seconds:.2f} s")
    for merge in args.merge:  # vidtok
        with attach_any(model, merge, halves=(attend, feed)) as model.merging:  # vidtok
            share, seconds = accuracy(model)  # vidtok
            tokens = " ".join(map(str, model.merging.run.tokens))  # vidtok
            print(f"{merge}: accuracy {share:.3f}, {seconds:.2f} s, tokens {tokens}")  # vidtok
        model.merging = None  # vidtok


if __name__ == "__main__":
    main()
