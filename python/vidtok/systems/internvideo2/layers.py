"""What InternVideo2's vision encoder is built of; parameters have their published names."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge.attention import Attend, plain, sdpa
from vidtok.merge.run import weighted_mean
from vidtok.systems.internvideo2.config import InternVideo2Config


@lru_cache(1)
def flash_function() -> Callable[..., Tensor] | None:
    """``flash_attn_func`` where the package is installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def flash_fits(q: Tensor) -> bool:
    """Whether FlashAttention is there and takes such queries."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and flash_function() is not None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    function = flash_function()
    assert function is not None and mask is None
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return function(q, k, v, softmax_scale=scale).transpose(1, 2)


class RMSNorm(nn.Module):
    r""":math:`w \cdot x / \sqrt{mean(x^2) + \epsilon}` in fp32."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LayerScale(nn.Module):
    """A factor for each channel, in fp32."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma.float()).to(x.dtype)


class DropPath(nn.Module):
    """Leaves a half of a block out for whole rows, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over all heads together."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        channels = config.embed_dim
        self.num_heads, self.scale = config.num_heads, (channels // config.num_heads) ** -0.5
        #: Whether FlashAttention is used; None for wherever it can be.
        self.flash: bool | None = None
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.q_norm = RMSNorm(channels) if config.qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(channels) if config.qk_normalization else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, step: Any = None) -> Tensor:
        """``[B, T, C]``; ``step`` is that of a pass whose tokens merge, a :class:`vidtok.merge.Step`."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        able = flash_fits(q)
        if self.flash and not able:
            raise ValueError(
                "expected FlashAttention to be installed and bf16 or fp16 on a GPU, got "
                f"{q.dtype} on {q.device.type}{'' if flash_function() else ' without the package'}"
            )
        flash = able and self.flash is not False
        attend: Attend | None = _flash if flash else None
        if step is None:
            out = (attend or plain)(q, k, v, None, self.scale)
        else:
            out = step.attention(q, k, v, scale=self.scale, attend=attend, flash=flash)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``."""

    def __init__(self, config: InternVideo2Config, drop_path: float) -> None:
        super().__init__()
        channels, value = config.embed_dim, config.init_values
        self.norm1, self.attn = RMSNorm(channels), Attention(config)
        self.ls1 = nn.Identity() if value is None else LayerScale(channels, value)
        self.norm2, self.mlp = RMSNorm(channels), Mlp(channels, config.hidden)
        self.ls2 = nn.Identity() if value is None else LayerScale(channels, value)
        self.drop_path = DropPath(drop_path)

    def attend(self, x: Tensor, step: Any = None) -> Tensor:
        """The attention half."""
        return x + self.drop_path(self.ls1(self.attn(self.norm1(x), step)))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP half."""
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.attend(x))


class CrossAttention(nn.Module):
    """Attention of one query to tokens, with the biases as parameters of their own."""

    def __init__(self, channels: int, heads: int, out: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (channels // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(channels)) for _ in range(3))
        self.proj = nn.Linear(channels, out)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None) -> Tensor:
        q, k, v = (
            F.linear(q, self.q.weight, self.q_bias),
            F.linear(k, self.k.weight, self.k_bias),
            F.linear(v, self.v.weight, self.v_bias),
        )
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        bias = None if size is None else size.log().to(q.dtype)[:, None, None]
        return self.proj(sdpa(q, k, v, bias, self.scale).transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """One vector of all tokens: their mean asks, they answer."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        channels = config.embed_dim
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(channels, eps=1e-5) for _ in range(3))
        self.cross_attn = CrossAttention(channels, config.attn_pool_num_heads, config.clip_embed_dim)

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """``[B, T, C]`` to ``[B, D]``; a token counts ``size`` fp32 ``[B, T]`` times."""
        query = weighted_mean(x, size)[:, None]
        return self.cross_attn(self.norm1_q(query), self.norm1_k(x), self.norm1_v(x), size).squeeze(1)
