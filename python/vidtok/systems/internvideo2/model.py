"""InternVideo2's vision encoder as a plain module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidtok import _check
from vidtok.systems.internvideo2 import positions
from vidtok.systems.internvideo2.config import InternVideo2Config
from vidtok.systems.internvideo2.layers import AttentionPool, Block


class Vision(NamedTuple):
    """What the encoder gives: ``tokens [B, T, C]`` after the block asked for, and ``pooled [B, D]`` of them."""

    tokens: Tensor
    pooled: Tensor


class PatchEmbed(nn.Module):
    """Patches of pixels to tokens, frame after frame."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class InternVideo2(nn.Module):
    """The vision encoder of InternVideo2, stage 2.

    Pre-norm blocks with RMSNorm, queries and keys normalised over the full width, layer scale, a class token,
    and a pool by attention. ``vidtok.attach(model, vision="tome:r=25")`` merges tokens of all frames of a clip;
    the pool then weighs by size. :func:`vidtok.systems.internvideo2.load` reads published weights, whose names
    the parameters have: see its key map, and what of it could not be checked.

    FlashAttention is used where it is installed and the tokens are bf16 or fp16 on a GPU, otherwise PyTorch's
    own attention; ``model.use_flash(False)`` keeps to the latter. ``model.checkpoint_num`` blocks, from the first
    on, are computed again in the backward pass.

    Source: Wang et al., InternVideo2, ECCV 2024, §3.

    Example:
        >>> import torch
        >>> sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "attn_pool_num_heads": 2, "clip_embed_dim": 8}
        >>> model = InternVideo2(InternVideo2Config(img_size=28, **sizes))
        >>> tokens, pooled = model(torch.zeros(1, 3, 4, 28, 28))
        >>> tokens.shape, pooled.shape
        (torch.Size([1, 17, 32]), torch.Size([1, 8]))
    """

    def __init__(self, config: InternVideo2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or InternVideo2Config()
        channels, (time, rows, columns) = config.embed_dim, config.grid
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        if config.sep_pos_embed:
            self.pos_embed_cls = nn.Parameter(torch.zeros(1, 1, channels))
            self.pos_embed_spatial = nn.Parameter(positions.spatial(channels, rows, columns)[None])
            self.pos_embed_temporal = nn.Parameter(positions.sincos(channels, torch.arange(time))[None])
        else:
            self.pos_embed = nn.Parameter(positions.joint(channels, config.grid))
            if config.sep_image_video_pos_embed:
                self.img_pos_embed = nn.Parameter(positions.joint(channels, (1, rows, columns)))
        rate = config.drop_path_rate / max(1, config.depth - 1)
        self.blocks = nn.ModuleList(Block(config, rate * i) for i in range(config.depth))
        self.clip_projector = AttentionPool(config)
        #: How many blocks are computed again in the backward pass.
        self.checkpoint_num = 0
        self.apply(_init)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def use_flash(self, flash: bool | None = None) -> None:
        """Use FlashAttention (True), PyTorch's attention (False), or the former wherever it can be (None)."""
        for block in self.blocks:
            block.attn.flash = flash  # type: ignore[union-attr, assignment]

    def gradient_checkpointing_enable(self, blocks: int | None = None) -> None:
        """Compute the first ``blocks`` blocks (all of them) again in the backward pass."""
        self.checkpoint_num = len(self.blocks) if blocks is None else blocks

    def gradient_checkpointing_disable(self) -> None:
        """Keep what every block computes."""
        self.checkpoint_num = 0

    def positions(self, image: bool = False) -> Tensor:
        """``[1, T, C]`` of the class token and the patches of a clip, or of an image."""
        if self.config.sep_pos_embed:
            when = self.pos_embed_temporal[:, :1] if image else self.pos_embed_temporal
            patches = when[:, :, None] + self.pos_embed_spatial[:, None]
            return torch.cat([self.pos_embed_cls, patches.flatten(1, 2)], 1)
        if not image:
            return self.pos_embed
        if self.config.sep_image_video_pos_embed:
            return self.img_pos_embed
        time = self.config.grid[0]
        # An image has the mean of the places that its patches have in a clip.
        patches = self.pos_embed[:, 1:].unflatten(1, (time, -1)).mean(1)
        return torch.cat([self.pos_embed[:, :1], patches], 1)

    def encode(self, x: Tensor, mask: Tensor | None, image: bool, stop: int) -> Tensor:
        """``[B, T, C]`` after the first ``stop`` blocks."""
        x = self.patch_embed(x.to(self.patch_embed.proj.weight.dtype))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.positions(image)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2] or (mask.sum(1) != mask[0].sum()).any():
                _check.fail(f"mask of bool {list(x.shape[:2])} with as many True in every row", mask)
            x = x[~mask].unflatten(0, (x.shape[0], -1))
        for i, block in enumerate(self.blocks[:stop]):
            if i < self.checkpoint_num and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """``[B, D]`` of tokens ``[B, T, C]``."""
        return self.clip_projector(x)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        use_image: bool = False,
        x_vis_return_idx: int = -1,
        x_vis_only: bool = False,
    ) -> Vision | Tensor:
        """Tokens and their pool; the arguments are the published ones.

        Args:
            x: pixels ``[B, 3, T, H, W]``, normalised; ``T`` frames as configured, or one with ``use_image``.
            mask: bool ``[B, 1 + N]``, True where a token (the class token is the first) is left out.
            use_image: whether ``x`` is a single frame, which has positions of its own.
            x_vis_return_idx: the block whose tokens are given, counted from the end, -1 the last; later blocks
                are not computed.
            x_vis_only: whether the tokens alone are given.

        Returns:
            ``Vision(tokens [B, T', C], pooled [B, D])``, or the tokens. The aligned features that training
            against a teacher reads are not computed.

        Raises:
            ValueError: another size, frame count, or block than there are.
        """
        config = self.config
        time = config.tubelet_size if use_image else config.num_frames
        want = (config.in_chans, time, config.img_size, config.img_size)
        if x.dim() != 5 or tuple(x.shape[1:]) != want:
            _check.fail(f"pixels [B, {', '.join(map(str, want))}]", x)
        if isinstance(x_vis_return_idx, bool) or not -config.depth <= x_vis_return_idx < 0:
            _check.fail(f"x_vis_return_idx from {-config.depth} to -1", repr(x_vis_return_idx))
        tokens = self.encode(x, mask, use_image, config.depth + x_vis_return_idx + 1)
        return tokens if x_vis_only else Vision(tokens, self.pool(tokens))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
