"""Weighted gather-reduce of packed tokens by a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from vidtok.kernels.reference._numerics import accumulate_dtype


def _check_range(index: Tensor, n: int, name: str, lowest: int) -> None:
    if index.numel() and (int(index.min()) < lowest or int(index.max()) >= n):
        raise IndexError(f"expected {name} in [{lowest}, {n}), got [{int(index.min())}, {int(index.max())}]")


def check_csr(member: Tensor, offset: Tensor, num_out: int, num_in: int) -> None:
    """Raise unless the lists describe ``num_out`` outputs over ``num_in`` inputs."""
    _check_range(member, num_in, "member", 0)
    bad = offset.shape[0] != num_out + 1 or int(offset[0]) != 0 or int(offset[-1]) != member.shape[0]
    if bad or bool((offset.diff() < 0).any()):
        raise IndexError(
            f"expected offset [{num_out + 1}] rising from 0 to {member.shape[0]}, got {offset.tolist()[:8]}"
        )


def plan_apply(
    x: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None
) -> Tensor:
    """y[m] = Σ weight·x[member]; without member lists y[m] = x[anchor[m]], zeros where it is −1."""
    if member is None or offset is None or weight is None:
        _check_range(anchor, x.shape[0], "anchor", -1)
        if anchor.numel() == 0:
            return x.new_empty(0, x.shape[1])
        if x.shape[0] == 0:
            return x.new_zeros(anchor.shape[0], x.shape[1])
        rows = x[anchor.long().clamp(min=0)]
        return torch.where((anchor >= 0).unsqueeze(1), rows, torch.zeros((), dtype=x.dtype, device=x.device))
    check_csr(member, offset, anchor.shape[0], x.shape[0])
    acc = accumulate_dtype(x.dtype)
    counts = offset.diff().long()
    owner = torch.repeat_interleave(torch.arange(anchor.shape[0], device=x.device), counts)
    out = torch.zeros(anchor.shape[0], x.shape[1], dtype=acc, device=x.device)
    out.index_add_(0, owner, x[member.long()].to(acc) * weight.to(acc).unsqueeze(1))
    # A copy is a copy, whatever its weight rounds to.
    single = (counts == 1).nonzero().squeeze(1)
    out = out.to(x.dtype)
    out[single] = x[member[offset[:-1].long()[single]].long()]
    return out


def plan_apply_backward(
    grad: Tensor, anchor: Tensor, member: Tensor | None, offset: Tensor | None, weight: Tensor | None, num_in: int
) -> Tensor:
    """dx[member] += weight·dy."""
    acc = accumulate_dtype(grad.dtype)
    out = torch.zeros(num_in, grad.shape[1], dtype=acc, device=grad.device)
    if member is None or offset is None or weight is None:
        _check_range(anchor, num_in, "anchor", -1)
        here = (anchor >= 0).nonzero().squeeze(1)
        out.index_add_(0, anchor[here].long(), grad[here].to(acc))
        return out.to(grad.dtype)
    check_csr(member, offset, anchor.shape[0], num_in)
    owner = torch.repeat_interleave(torch.arange(anchor.shape[0], device=grad.device), offset.diff().long())
    out.index_add_(0, member.long(), grad[owner].to(acc) * weight.to(acc).unsqueeze(1))
    return out.to(grad.dtype)
