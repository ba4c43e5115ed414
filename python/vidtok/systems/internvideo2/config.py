"""Sizes of an InternVideo2 vision encoder."""

from __future__ import annotations

from dataclasses import dataclass

from vidtok import _check


@dataclass(frozen=True)
class InternVideo2Config:
    """The published names and the values of stage 2, 1B; ``num_frames`` is what the position embedding is made for.

    Args:
        sep_pos_embed: positions as a spatial and a temporal embedding that add up, in place of a joint one.
        sep_image_video_pos_embed: a joint embedding of their own for single images.
        init_values: of the layer scale; None for blocks without.
        drop_path_rate: of the last block, in training; published runs use 0.25.
        attn_pool_num_heads: of the pool that gives one vector of ``clip_embed_dim`` channels.

    Source: Wang et al., InternVideo2, ECCV 2024, §3 and its published configuration.

    Example:
        >>> InternVideo2Config().tokens
        1025
    """

    in_chans: int = 3
    patch_size: int = 14
    img_size: int = 224
    num_frames: int = 4
    tubelet_size: int = 1
    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 48 / 11
    qkv_bias: bool = False
    qk_normalization: bool = True
    init_values: float | None = 1e-5
    drop_path_rate: float = 0.0
    attn_pool_num_heads: int = 16
    clip_embed_dim: int = 768
    sep_pos_embed: bool = False
    sep_image_video_pos_embed: bool = False

    def __post_init__(self) -> None:
        for a, b in (("img_size", "patch_size"), ("num_frames", "tubelet_size"), ("embed_dim", "num_heads")):
            if getattr(self, b) < 1 or getattr(self, a) % getattr(self, b) or getattr(self, a) < 1:
                _check.fail(f"{a} as a multiple of {b}={getattr(self, b)}", str(getattr(self, a)))
        if self.embed_dim % self.attn_pool_num_heads:
            _check.fail(
                f"embed_dim as a multiple of attn_pool_num_heads={self.attn_pool_num_heads}", str(self.embed_dim)
            )
        if self.embed_dim % 16:
            _check.fail("embed_dim as a multiple of 16, for sines and cosines of three axes", str(self.embed_dim))
        if self.sep_pos_embed and self.sep_image_video_pos_embed:
            _check.fail("one of sep_pos_embed and sep_image_video_pos_embed", "both")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Steps in time, rows and columns of the patches."""
        side = self.img_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def hidden(self) -> int:
        """Channels inside the MLP; 6144 for 1B."""
        # A ratio that was made of two widths gives the first one back.
        return int(self.embed_dim * self.mlp_ratio + 1e-6)

    @property
    def tokens(self) -> int:
        """The class token and the patches of a clip."""
        time, rows, columns = self.grid
        return 1 + time * rows * columns
