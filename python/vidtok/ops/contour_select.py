"""Representative frames on one contour of equal distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import contour_select as native
from vidtok.kernels.reference import contour_select as reference
from vidtok.ops._library import define


class Contour(NamedTuple):
    """``index`` int64 ascending packed frame indices; ``distance`` fp32 ``[T]`` of every frame."""

    index: Tensor  # type: ignore[assignment]
    distance: Tensor


def _fake(
    x: Tensor, num: Any, query: Any, max_rank: int, rule: int, seed: int, cu_seqlens: Any
) -> tuple[Tensor, Tensor]:
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = num[0] * sequences if len(num) == 1 else sum(num)
    return x.new_empty(size, dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


_op = define(
    "contour_select",
    "(Tensor x, SymInt[] num, Tensor? query, int max_rank, int rule, int seed, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    reference.contour_select,
    _fake,
    native.contour_select,
)


def contour_select(
    x: Tensor,
    num: int | Sequence[int],
    *,
    query: Tensor | None = None,
    rank: int = 64,
    rule: str = "stratified",
    seed: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Contour:
    r"""Choose ``num`` frames whose Mahalanobis distances lie nearest the median contour.

    Frames are projected by Q of the QR decomposition of a seeded ``[C, r]`` normal draw,
    :math:`r = \min(rank, \lfloor T/4 \rfloor, C)`; weights are softmax(cos(x, query)/0.1) or uniform;
    :math:`\Sigma = 0.9 S + 0.1\,(\mathrm{tr} S / r) I` of the weighted covariance S;
    :math:`d^2 = \|L^{-1}(z - \mu)\|^2`, rounded to 16 significant bits. The contour is the lower median of d².
    Rules: ``stratified`` takes from each of ``num`` equal time segments the frame nearest the contour,
    ``contour`` the nearest overall, ``contour+fps`` spreads in time among the 2·num nearest, from the
    nearest on. Ties go to the lower index; frames that are not finite rank last. Not differentiable.

    Args:
        x: ``[T, C]`` frame features, packed when ``cu_seqlens`` is given. fp32, bf16 or fp16.
        num: frames to choose, one number or one per sequence; at most the sequence's frames.
        query: ``[C]``, or ``[S, C]`` one per sequence.
        rank: largest dimension of the projection.
        rule: ``stratified``, ``contour`` or ``contour+fps``.
        seed: of the projection.
        cu_seqlens: int32 ``[S+1]``; one sequence when None.

    Returns:
        ``Contour(index, distance)``.

    Raises:
        ValueError: arguments that do not fit.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.contour_select(torch.randn(32, 16), 4).index.shape
        torch.Size([4])
    """
    _check.float_tensor(x, "x", "[T, C]")
    if rule not in reference.RULES:
        _check.fail(f"rule among {', '.join(reference.RULES)}", repr(rule))
    if rank < 1:
        _check.fail("rank of at least 1", str(rank))
    sequences = 1
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(cu_seqlens, x.shape[0])
        sequences = cu_seqlens.shape[0] - 1
    budgets = [num] if isinstance(num, (int, torch.SymInt)) else list(num)
    if len(budgets) not in (1, sequences):
        _check.fail(f"num as one number or one for each of {sequences} sequences", str(len(budgets)))
    if query is not None:
        query = query[None].expand(sequences, -1) if query.dim() == 1 else query
        if tuple(query.shape) != (sequences, x.shape[1]):
            _check.fail(f"query of shape [{x.shape[1]}] or [{sequences}, {x.shape[1]}]", str(list(query.shape)))
        query = query.detach().to(x.dtype).contiguous()
    features = _check.decided_from(x)
    return Contour(*_op(features, budgets, query, rank, reference.RULES.index(rule), seed, cu_seqlens))
