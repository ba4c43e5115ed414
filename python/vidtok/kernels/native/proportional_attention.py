"""Compiled proportional_attention."""

from __future__ import annotations

from torch import Tensor

from vidtok.kernels.native import DTYPE_CODE, check, extension, num_threads


def proportional_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    r""":math:`\mathrm{softmax}(\mathrm{scale}\, q k^\top + b)\, v`, with one bias for each key.

    A row whose keys all have the bias :math:`-\infty` gives zeros. Sums are in fp32.

    Args:
        q: ``[B, H, N, D]``, fp32, bf16 or fp16; the channels of a row lie side by side.
        k, v: ``[B, H, M, D]``, likewise.
        bias: fp32 ``[B, M]`` or ``[1, M]``, or None.
        scale: of the scores.

    Returns:
        ``[B, H, N, D]``, in memory ``[B, N, H, D]``.
    """
    batch, heads, rows, dim = q.shape
    out = q.new_empty(batch, rows, heads, dim)
    address, step = 0, 0
    if bias is not None:
        bias = bias.contiguous()
        address, step = bias.data_ptr(), bias.shape[1] if bias.shape[0] > 1 else 0
    status = extension().proportional_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), DTYPE_CODE[q.dtype], batch, heads, rows, k.shape[2], dim,
        [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]], address, step, scale, out.data_ptr(), num_threads(),
    )  # fmt: skip
    if status:
        check(status, "proportional_attention")
    return out.transpose(1, 2)
