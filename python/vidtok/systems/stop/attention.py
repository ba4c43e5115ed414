"""Attention and blocks with the parameter names of CLIP."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge.run import Step


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32, in the dtype of ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


class QuickGELU(nn.Module):
    r""":math:`x \sigma(1.702 x)`."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(1.702 * x)
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


class Attention(nn.Module):
    """Multi-head attention whose projections can be taken apart."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width).normal_(std=width**-0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor, start: int = 0, stop: int = 3) -> Tensor:
        """Parts ``start`` to ``stop`` of queries, keys and values, side by side: ``[…, (stop − start) C]``."""
        rows = slice(start * self.width, stop * self.width)
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, n C]`` as ``[n, B, H, T, D]`` without a copy."""
        return x.unflatten(-1, (-1, self.heads, self.width // self.heads)).permute(2, 0, 3, 1, 4)

    def join(self, x: Tensor) -> Tensor:
        """The output projection of ``[B, H, T, D]``: ``[B, T, C]``."""
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = self.split(self.project(x))
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


class Block(nn.Module):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def attend(self, x: Tensor, step: Step | None) -> Tensor:
        """The attention half of ``[B, T, C]``; keys weigh by the sizes of ``step``."""
        if step is None:
            return x + self.attn(self.ln_1(x))
        q, k, v = self.attn.split(self.attn.project(self.ln_1(x)))
        return x + self.attn.join(step.attention(q, k, v))

    def attend_first(self, x: Tensor, step: Step | None, count: int = 1) -> Tensor:
        """The attention half of the first ``count`` tokens alone, ``[B, count, C]``."""
        h = self.ln_1(x)
        (q,) = self.attn.split(self.attn.project(h[:, :count], 0, 1))
        k, v = self.attn.split(self.attn.project(h, 1))
        out = F.scaled_dot_product_attention(q, k, v) if step is None else step.attention(q, k, v)
        return x[:, :count] + self.attn.join(out)

    def feed(self, x: Tensor) -> Tensor:
        """The MLP half."""
        return x + self.mlp(self.ln_2(x))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        return self.feed(x + self.attn(self.ln_1(x), causal))
