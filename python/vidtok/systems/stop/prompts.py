"""What STOP learns beside CLIP: prompts, adapters, and the modules that make prompts from a video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtok.systems.stop.config import Config, Sizes

_PIXEL_KERNEL, _MASK_KERNEL, _PATCH_KERNEL = (3, 11, 11), (5, 11, 11), (3, 15, 25)


def _conv(channels_in: int, channels_out: int, kernel: tuple[int, int, int]) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel, padding="same")


class Prompts(nn.Module):
    """Prompts of a video, which pass through all layers, and of its frames, which every layer brings anew."""

    def __init__(self, sizes: Sizes, config: Config) -> None:
        super().__init__()
        width = sizes.vision_width
        self.video = nn.Parameter(0.02 * torch.randn(config.global_prompts, width))
        self.frame = nn.Parameter(0.02 * torch.randn(sizes.vision_layers, config.frame_prompts, width))


class Adapter(nn.Module):
    r"""``scale · up(PReLU(down(x)))``, zero at first."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(width, hidden), nn.PReLU(), nn.Linear(hidden, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.act(self.down(x)))


class PixelPrompt(nn.Module):
    r"""The intra-frame spatial prompt, on pixels: :math:`x + s p + s p \cdot mask`.

    :math:`p` comes from four 3-D convolutions (3→9→9→9→16, kernels 3×11×11, PReLU after the second and the
    third) and an MLP of each pixel (16→16→3). ``mask`` has the cells of the patch grid whose mean of another
    convolution (3→1, 5×11×11) lies strictly above the largest but ``regions``.

    As published, a cell is not a patch: the means go over the pixels whose coordinates agree modulo the grid's
    side, so that the mask repeats every ``grid`` pixels. The mask carries no gradient, so that the convolution
    that it comes from keeps its first weights.
    """

    def __init__(self, sizes: Sizes, config: Config) -> None:
        super().__init__()
        self.grid, self.scale = sizes.grid, config.prompt_scale
        self.regions = min(config.regions, sizes.grid**2 - 1)
        self.convs = nn.Sequential(
            _conv(3, 9, _PIXEL_KERNEL),
            _conv(9, 9, _PIXEL_KERNEL),
            nn.PReLU(),
            _conv(9, 9, _PIXEL_KERNEL),
            nn.PReLU(),
            _conv(9, 16, _PIXEL_KERNEL),
        )
        drop = config.prompt_dropout
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.PReLU(), nn.Dropout(drop), nn.Linear(16, 3), nn.Dropout(drop))
        self.saliency = _conv(3, 1, _MASK_KERNEL).requires_grad_(False)

    def mask(self, x: Tensor) -> Tensor:
        """Of pixels ``[B, 3, T, H, W]``, ``[B, 1, T, H, W]``."""
        score, g = self.saliency(x).squeeze(1), self.grid
        batch, frames, side, _ = score.shape
        cells = score.reshape(batch, frames, side // g, g, side // g, g).mean((2, 4)).flatten(2)
        least = cells.topk(self.regions + 1, -1).values[..., -1:]
        chosen = (cells > least).to(x.dtype).view(batch, 1, frames, 1, g, 1, g)
        return chosen.expand(-1, -1, -1, side // g, -1, side // g, -1).reshape(batch, 1, frames, side, side)

    def forward(self, video: Tensor) -> Tensor:
        """``[B, T, 3, H, W]`` in and out."""
        x = video.transpose(1, 2)
        p = self.mlp(self.convs(x).movedim(1, -1)).movedim(-1, 1)
        return (x + self.scale * p + self.scale * p * self.mask(x)).transpose(1, 2)


class FramePrompt(nn.Module):
    r"""The inter-frame temporal prompt, added to the frame prompts of every layer.

    Self-attention over the patches of all frames, 3-D convolutions over (frame, patch, channel) (1→9→1,
    3×15×25), an MLP over the patches of a frame (P→16→prompts), times the frame's weight
    :math:`(w_t - \min w) / (\max w - \min w)`, the mean of a convolution (1→1, 5×11×11), and a factor.
    Minimum and maximum are those of the video, or of the whole batch as published; equal weights give 0.
    """

    def __init__(self, sizes: Sizes, config: Config) -> None:
        super().__init__()
        self.scale, self.over = config.prompt_scale, config.frame_weights
        self.attention = nn.MultiheadAttention(sizes.vision_width, sizes.vision_heads, batch_first=True)
        self.convs = nn.Sequential(_conv(1, 9, _PATCH_KERNEL), nn.PReLU(), _conv(9, 1, _PATCH_KERNEL))
        drop = config.prompt_dropout
        self.mlp = nn.Sequential(
            nn.Linear(sizes.grid**2, 16),
            nn.PReLU(),
            nn.Dropout(drop),
            nn.Linear(16, config.frame_prompts),
            nn.Dropout(drop),
        )
        self.weight = _conv(1, 1, _MASK_KERNEL)

    def weights(self, patches: Tensor) -> Tensor:
        """Of ``[B, T, P, C]``, ``[B, T]`` in [0, 1]."""
        raw = self.weight(patches.unsqueeze(1)).mean((1, 3, 4))
        low, high = (raw.amin(1, True), raw.amax(1, True)) if self.over == "video" else (raw.amin(), raw.amax())
        return (raw - low) / (high - low).clamp(min=torch.finfo(raw.dtype).tiny)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch embeddings ``[B, T, P, C]`` to prompts ``[B, T, prompts, C]``."""
        flat = patches.flatten(1, 2)
        mixed = self.attention(flat, flat, flat, need_weights=False)[0].view_as(patches)
        prompts = self.mlp(self.convs(mixed.unsqueeze(1)).squeeze(1).transpose(2, 3)).transpose(2, 3)
        return self.scale * self.weights(patches)[..., None, None] * prompts
