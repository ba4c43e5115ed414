"""CLIP's two towers, with the parameter names of the original checkpoints."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.options import ToMe
from vidtok.merge.run import Step
from vidtok.merge.tempme import TempMe
from vidtok.systems.stop.attention import Block, LayerNorm
from vidtok.systems.stop.config import Sizes
from vidtok.systems.stop.runs import begin, each, join, recomputed


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast("list[Block]", list(self.resblocks))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """Frames to embeddings; the last layer computes the class token alone."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.sizes = sizes
        self.conv1 = nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(sizes.grid**2 + 1, width) * width**-0.5)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, sizes.vision_heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, sizes.embed) * width**-0.5)

    def patches(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to patch embeddings ``[B, P, C]``, before positions."""
        side = self.sizes.image
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            _check.fail(f"frames of shape [N, 3, {side}, {side}]", str(list(pixels.shape)))
        return self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)

    def prepare(self, patches: Tensor) -> Tensor:
        """Class token, positions and the first norm: ``[B, 1 + P, C]``."""
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding.to(patches.dtype))

    def project(self, x: Tensor) -> Tensor:
        """``ln_post`` and the projection."""
        return self.ln_post(x) @ self.proj.to(x.dtype)

    def forward(
        self, pixels: Tensor, options: ToMe | TempMe | None = None, frames: int = 1, again: bool = False
    ) -> tuple[Tensor, Any]:
        """``[N, 3, H, W]`` of videos of ``frames`` each to embeddings ``[N, E]``, and the run of what merged.

        ``again`` computes the layers a second time in the backward pass.
        """
        x = self.prepare(self.patches(pixels))
        run = begin(options, self.sizes.vision_layers, x.shape[1], frames)
        *blocks, last = self.transformer.blocks
        for index, block in enumerate(blocks):
            x = recomputed(again, _layer, block, x, None if run is None else run.step(index))
        step = None if run is None else run.step(len(blocks))
        x = last.feed(last.attend_first(join(step, x), step, each(step)))
        # Clips that were filled up have the class tokens of frames that are not there.
        x = x.reshape(-1, x.shape[0] * x.shape[1] * frames // pixels.shape[0], x.shape[-1])[:, :frames].flatten(0, 1)
        return self.project(x), run


def _layer(block: Block, x: Tensor, step: Step | None) -> Tensor:
    x = block.attend(join(step, x), step)
    return block.feed(x if step is None else step.merge(x))


class CLIP(nn.Module):
    r"""CLIP's vision and text towers.

    Args:
        sizes: of both towers.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.visual = VisionTransformer(sizes)
        self.transformer = Transformer(sizes.text_width, sizes.text_layers, sizes.text_heads)
        self.token_embedding = nn.Embedding(sizes.vocabulary, sizes.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(sizes.context, sizes.text_width) * 0.01)
        self.ln_final = LayerNorm(sizes.text_width)
        self.text_projection = nn.Parameter(torch.randn(sizes.text_width, sizes.embed) * sizes.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Captions ``[B, L]``, each with the largest id at its end, to embeddings ``[B, E]``."""
        length = input_ids.shape[-1]
        if input_ids.dim() != 2 or not 0 < length <= self.sizes.context:
            _check.fail(f"input_ids of shape [B, L] with L of 1 to {self.sizes.context}", str(list(input_ids.shape)))
        x = self.token_embedding(input_ids)
        x = self.transformer(x + self.positional_embedding[:length].to(x.dtype), causal=True)
        # Attention is causal: what comes after the end of the text is not seen by it.
        x = x[torch.arange(x.shape[0], device=x.device), input_ids.argmax(-1)]
        return self.ln_final(x) @ self.text_projection.to(x.dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` to embeddings ``[N, E]``."""
        return self.visual(pixels)[0]
