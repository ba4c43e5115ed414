"""Bipartite token matching and merging."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok import _check
from vidtok.kernels.native import bipartite as native
from vidtok.kernels.reference import bipartite as reference
from vidtok.ops._library import define, dynamic_size, needs_grad
from vidtok.ops.plan_apply import _op_backward as _apply_backward
from vidtok.plan import Plan


class Merged(NamedTuple):
    """Merged tokens ``x``, their fp32 ``size``, and the ``plan`` that was executed."""

    x: Tensor
    size: Tensor
    plan: Plan


def prefix_merge_count(tokens: Any, r: Any, protected: int) -> Any:
    """r' of a sequence whose first ``protected`` tokens stay, from shapes alone."""
    sources = (tokens + 1) // 2 - (protected + 1) // 2
    destinations = tokens // 2 - protected // 2
    if destinations <= 0 or sources <= 0:
        return 0
    return max(0, min(r, (tokens - protected) // 2, sources))


def _sizes(metric: Tensor, r: Any, protected: int, mask: Any, cu_seqlens: Any) -> tuple[Any, Any, Any]:
    """Sequences, packed inputs, packed outputs."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1, metric.shape[-2], dynamic_size()
    batch, tokens = metric.shape[0], metric.shape[-2]
    if mask is not None:
        return batch, batch * tokens, dynamic_size()
    return batch, batch * tokens, batch * (tokens - prefix_merge_count(tokens, r, protected))


def _fake_match(metric: Tensor, r: Any, size: Any, protected: int, mask: Any, cu_seqlens: Any) -> tuple[Tensor, ...]:
    batch, n, m = _sizes(metric, r, protected, mask, cu_seqlens)

    def ints(length: Any) -> Tensor:
        return metric.new_empty(length, dtype=torch.int32)

    weight = metric.new_empty(n, dtype=torch.float32)
    return ints(batch + 1), ints(batch + 1), ints(m), ints(n), ints(m + 1), weight


def _fake_merge(
    x: Tensor, metric: Tensor, r: Any, size: Any, protected: int, mask: Any, cu_seqlens: Any
) -> tuple[Tensor, ...]:
    lists = _fake_match(metric, r, size, protected, mask, cu_seqlens)
    m = lists[2].shape[0]
    return x.new_empty(m, x.shape[-1]), x.new_empty(m, dtype=torch.float32), *lists


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.shape = inputs[0].shape
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    anchor, member, offset, weight = ctx.saved_tensors
    n = member.shape[0]
    dx = _apply_backward(grad.contiguous(), anchor, member, offset, weight, n)
    return dx.view(ctx.shape), None, None, None, None, None, None


_ARGUMENTS = "Tensor metric, SymInt r, Tensor? size, int protected, Tensor? mask, Tensor? cu_seqlens"
_LISTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
_match = define(
    "bipartite_match", f"({_ARGUMENTS}) -> ({_LISTS})", reference.bipartite_match, _fake_match, native.bipartite_match
)
_MERGE = f"(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, {_LISTS})"
_merge = define("bipartite_merge", _MERGE, reference.bipartite_merge, _fake_merge, native.bipartite_merge)
_merge_grad = define(
    "bipartite_merge_grad",
    _MERGE,
    reference.bipartite_merge,
    _fake_merge,
    native.bipartite_merge,
    setup_context=_setup,
    backward=_backward,
)


def _rows(x: Tensor) -> Tensor:
    """``x`` with a contiguous last dimension; the others may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prepare(
    metric: Tensor, r: int, size: Tensor | None, protected: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, int, Tensor | None, Tensor | None, tuple[int, ...]]:
    """Checked arguments, and the leading shape (batch, tokens) or (tokens,)."""
    shapes = "[B, T, C] or [B, H, T, D]" if cu_seqlens is None else "[N, C] or [H, N, D]"
    _check.float_tensor(metric, "metric", shapes)
    n = metric.shape[-2]
    lead = (metric.shape[0], n) if cu_seqlens is None else (n,)
    if not isinstance(r, torch.SymInt) and r < 0:
        _check.fail("r of at least 0", str(r))
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(cu_seqlens, n)
    mask, prefix = None, 0
    if isinstance(protected, Tensor):
        if protected.dtype != torch.bool or tuple(protected.shape) != lead:
            _check.fail(f"protected as a prefix length or bool {list(lead)}", protected)
        mask = protected.contiguous()
    else:
        prefix = protected
        if prefix < 0 or (cu_seqlens is None and prefix > n):
            _check.fail(f"protected between 0 and {n}", str(prefix))
    if size is not None:
        if size.dtype != torch.float32 or tuple(size.shape) != lead:
            _check.fail(f"size of float32 {list(lead)}", size)
        size = _check.decided_from(size)
    return _rows(metric.detach() if metric.requires_grad else metric), size, prefix, mask, cu_seqlens, lead


def _plan(lists: tuple[Tensor, ...], lead: tuple[int, ...]) -> Plan:
    cu_in, cu_out, anchor, member, offset, weight = lists
    if len(lead) == 1:
        return Plan(cu_in, cu_out, anchor, member, offset, weight, lead[0])
    batch, tokens = lead
    length_out = anchor.shape[0] // batch if batch else 0
    return Plan(cu_in, cu_out, anchor, member, offset, weight, batch * tokens, tokens, length_out)


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protected: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    size: Tensor | None = None,
) -> Plan:
    r"""Decide which tokens merge: each source into its most similar destination, the ``r`` best only.

    Sources are unprotected even positions of the current sequence, destinations unprotected odd
    ones. Similarity is the cosine, rounded to multiples of 2⁻²⁰ (2⁻¹⁶ for bf16 and fp16); ties go
    to the lower index; NaN ranks last. :math:`r' = \min(r, \lfloor (T-p)/2 \rfloor, sources)`, 0
    without destinations. Output order: protected, unmerged even, odd tokens, each ascending.
    Not differentiable.

    Args:
        metric: ``[B, T, C]``, or ``[B, H, T, D]`` keys whose mean over heads is taken in fp32; with
            ``cu_seqlens`` packed ``[N, C]`` or ``[H, N, D]``. fp32, bf16 or fp16.
        r: merges per sequence. A dense batch merges the smallest r' of its sequences in each.
        protected: length of a prefix that stays, or a bool mask ``[B, T]`` or ``[N]``.
        cu_seqlens: int32 ``[S+1]`` offsets; r' is then each sequence's own.
        size: fp32 ``[B, T]`` or ``[N]``, how many tokens each one stands for; gives the weights.

    Returns:
        A :class:`~vidtok.plan.Plan` with weights size/Σ size and merged outputs anchored at their destination.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source: Bolya et al., Token Merging, ICLR 2023, §3.

    Example:
        >>> import torch, vidtok
        >>> vidtok.ops.bipartite_match(torch.eye(4)[None], 1).num_out
        3
    """
    checked, size, prefix, mask, cu_seqlens, lead = _prepare(metric, r, size, protected, cu_seqlens)
    return _plan(_match(checked, r, size, prefix, mask, cu_seqlens), lead)


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    protected: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
) -> Merged:
    r"""Match by ``metric`` as :func:`bipartite_match` and merge ``x`` by size-weighted means.

    :math:`y = \sum size_i x_i / \sum size_i` in fp32, sizes add; a token that meets no other is
    copied bit for bit. ``x`` is read once and written once. Carries gradients to ``x``.

    Args:
        x: ``[B, T, C]``, or packed ``[N, C]`` with ``cu_seqlens``. fp32, bf16 or fp16.
        metric: as in :func:`bipartite_match`.
        r: merges per sequence.
        size: fp32 ``[B, T]`` or ``[N]``; ones when None.
        protected: prefix length or bool mask.
        cu_seqlens: int32 ``[S+1]``.

    Returns:
        ``Merged(x [B, T−r', C], size [B, T−r'], plan)``, packed ``[M, C]`` and ``[M]`` with ``cu_seqlens``.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source: Bolya et al., Token Merging, ICLR 2023, §3.

    Example:
        >>> import torch, vidtok
        >>> x = torch.ones(1, 4, 2)
        >>> vidtok.ops.bipartite_merge(x, x, 1).size
        tensor([[1., 2., 1.]])
    """
    _check.float_tensor(x, "x", "[B, T, C]" if cu_seqlens is None else "[N, C]")
    checked, size, prefix, mask, cu_seqlens, lead = _prepare(metric, r, size, protected, cu_seqlens)
    if tuple(x.shape[:-1]) != lead:
        _check.fail(f"x of shape [{', '.join(map(str, lead))}, C]", str(list(x.shape)))
    op = _merge_grad if needs_grad(x) else _merge
    merged, total, *lists = op(_rows(x), checked, r, size, prefix, mask, cu_seqlens)
    plan = _plan(tuple(lists), lead)
    if len(lead) == 2:
        batch, length = lead[0], plan.length_out if lead[0] else lead[1]
        merged, total = merged.view(batch, length, x.shape[-1]), total.view(batch, length)
    return Merged(merged, total, plan)
