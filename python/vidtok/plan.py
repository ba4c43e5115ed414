"""The plan: for each output token, which input tokens it is made of, and where it stands.

Every method decides a :class:`Plan`; :func:`vidtok.ops.plan_apply` and
:func:`vidtok.ops.position_remap` move data by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from vidtok import _check
from vidtok._constant import constant

__all__ = ["Plan"]


def _segment_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Sequence number of each of ``total`` packed tokens, int64."""
    counts = cu_seqlens.diff().long()
    ids = torch.arange(counts.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, counts, output_size=total)


def offsets(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 ``[B+1]`` offsets of sequences of the given lengths."""
    return constant([0, *accumulate(int(n) for n in lengths)], torch.int32, device)


def compact(mask: Tensor, count: int | None) -> Tensor:
    """Indices of the True entries; without a wait for the device when their ``count`` is known."""
    if count is None:
        return torch.nonzero(mask).squeeze(1)
    at = torch.where(mask, mask.cumsum(0) - 1, count)
    out = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return out.scatter_(0, at, torch.arange(mask.shape[0], device=mask.device))[:count]


@dataclass(frozen=True, eq=False)
class Plan:
    r"""Which input tokens make each output token, and whose place it takes.

    Output ``m`` is :math:`y_m = \sum_{j=offset_m}^{offset_{m+1}-1} weight_j\, x_{member_j}` and
    takes positions, mask and labels of token ``anchor[m]``. A *gather* (every output has exactly
    its anchor as member) keeps the three lists empty and derives them when asked.

    Shapes: ``B`` sequences, ``N`` packed input tokens, ``M`` packed output tokens, ``nnz`` members.

    Args:
        cu_seqlens_in: int32 ``[B+1]``, offsets of the sequences in the input.
        cu_seqlens_out: int32 ``[B+1]``, offsets of the sequences in the output.
        anchor: int32 ``[M]``, packed input index whose place the output takes; −1 marks left
            padding, which has no members and is made only by :meth:`lift`.
        csr_member: int32 ``[nnz]`` packed input indices grouped by output; None for a gather.
        csr_offset: int32 ``[M+1]``; None for a gather.
        csr_weight: fp32 ``[nnz]``, summing to 1 per output; None for a gather.
        num_in: ``N``.
        length_in: tokens per sequence when all inputs are equally long and the host knows it.
        length_out: the same for the output.
        padded: whether left padding may be present.

    Inside a sequence outputs ascend by anchor, except in plans of ``bipartite_match`` and
    ``bipartite_merge``, which keep their own order (:meth:`sorted` restores the rule).
    """

    cu_seqlens_in: Tensor
    cu_seqlens_out: Tensor
    anchor: Tensor
    csr_member: Tensor | None
    csr_offset: Tensor | None
    csr_weight: Tensor | None
    num_in: int
    length_in: int | None = None
    length_out: int | None = None
    padded: bool = False

    # ------------------------------------------------------------------ constructors
    @classmethod
    def gather(
        cls,
        index: Tensor,
        cu_seqlens_in: Tensor,
        cu_seqlens_out: Tensor,
        num_in: int,
        *,
        length_in: int | None = None,
        length_out: int | None = None,
    ) -> Plan:
        """The plan that keeps the packed tokens ``index`` (ascending inside each sequence)."""
        return cls(
            cu_seqlens_in,
            cu_seqlens_out,
            index.to(torch.int32).contiguous(),
            None,
            None,
            None,
            num_in,
            length_in,
            length_out,
        )

    @classmethod
    def identity(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Plan:
        """The plan that keeps every token of sequences of the given lengths."""
        cu = offsets(lengths, device)
        n = sum(int(v) for v in lengths)
        common = int(lengths[0]) if lengths and all(int(v) == int(lengths[0]) for v in lengths) else None
        index = torch.arange(n, dtype=torch.int32, device=device)
        return cls(cu, cu, index, None, None, None, n, common, common)

    @classmethod
    def from_assignment(
        cls,
        assignment: Tensor,
        anchor: Tensor,
        cu_seqlens_in: Tensor,
        cu_seqlens_out: Tensor,
        num_in: int,
        *,
        partition: bool = False,
    ) -> Plan:
        """Plan of plain means: token ``i`` belongs to output ``assignment[i]`` (−1: to none).

        ``assignment`` int ``[N]``; ``anchor`` int ``[M]``. Members ascend inside each output. ``partition``
        says that every token belongs to an output, so that the device need not be asked.
        """
        m = anchor.shape[0]
        if partition:
            owner, member = torch.sort(assignment.long(), stable=True)
        else:
            member = torch.nonzero(assignment >= 0).squeeze(1)
            owner, order = torch.sort(assignment[member].long(), stable=True)
            member = member[order]
        count = torch.zeros(m, dtype=torch.int64, device=anchor.device)
        count.index_add_(0, owner, torch.ones_like(owner))
        offset = torch.zeros(m + 1, dtype=torch.int32, device=anchor.device)
        offset[1:] = count.cumsum(0)
        weight = (1.0 / count.to(torch.float32))[owner]
        return cls(
            cu_seqlens_in,
            cu_seqlens_out,
            anchor.to(torch.int32),
            member.to(torch.int32),
            offset,
            weight,
            num_in,
        )

    @classmethod
    def cat(cls, plans: Sequence[Plan]) -> Plan:
        """Put plans over consecutive packed inputs behind one another."""
        if not plans:
            return cls.identity([])
        if len(plans) == 1:
            return plans[0]
        base_in = list(accumulate((p.num_in for p in plans), initial=0))
        base_out = list(accumulate((p.num_out for p in plans), initial=0))

        def join(name: str, base: list[int]) -> Tensor:
            parts = [getattr(p, name)[1:] + b for p, b in zip(plans, base)]
            return torch.cat([getattr(plans[0], name)[:1], *parts]).to(torch.int32)

        anchor = torch.cat([torch.where(p.anchor < 0, p.anchor, p.anchor + b) for p, b in zip(plans, base_in)])
        if all(p.is_gather for p in plans):
            member = offset = weight = None
        else:
            member = torch.cat([p.member + b for p, b in zip(plans, base_in)]).to(torch.int32)
            weight = torch.cat([p.weight for p in plans])
            base_nnz = list(accumulate((p.member.shape[0] for p in plans), initial=0))
            offset = torch.cat([plans[0].offset[:1], *(p.offset[1:] + b for p, b in zip(plans, base_nnz))]).to(
                torch.int32
            )
        length_in = plans[0].length_in if len({p.length_in for p in plans}) == 1 else None
        length_out = plans[0].length_out if len({p.length_out for p in plans}) == 1 else None
        return cls(
            join("cu_seqlens_in", base_in),
            join("cu_seqlens_out", base_out),
            anchor.to(torch.int32),
            member,
            offset,
            weight,
            base_in[-1],
            length_in,
            length_out,
            any(p.padded for p in plans),
        )

    # ------------------------------------------------------------------ what it holds
    @property
    def is_gather(self) -> bool:
        """Whether every output is a copy of its anchor."""
        return self.csr_member is None

    @property
    def num_out(self) -> int:
        """Number of packed output tokens ``M``."""
        return self.anchor.shape[0]

    @property
    def num_sequences(self) -> int:
        """Number of sequences ``B``."""
        return self.cu_seqlens_in.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Device of the plan's tensors."""
        return self.anchor.device

    @property
    def member(self) -> Tensor:
        """int32 ``[nnz]``: packed input indices, grouped by output."""
        if self.csr_member is not None:
            return self.csr_member
        return self.anchor[self.anchor >= 0] if self.padded else self.anchor

    @property
    def offset(self) -> Tensor:
        """int32 ``[M+1]``: where each output's members begin."""
        if self.csr_offset is not None:
            return self.csr_offset
        out = torch.zeros(self.num_out + 1, dtype=torch.int32, device=self.device)
        out[1:] = (self.anchor >= 0).cumsum(0)
        return out

    @property
    def weight(self) -> Tensor:
        """fp32 ``[nnz]``: share of each member in its output."""
        if self.csr_weight is not None:
            return self.csr_weight
        return torch.ones(self.member.shape[0], dtype=torch.float32, device=self.device)

    def valid(self) -> Tensor:
        """bool ``[M]``: False for left padding."""
        return self.anchor >= 0

    def lengths_in(self) -> list[int]:
        """Input tokens per sequence, read on the host."""
        return self.cu_seqlens_in.diff().tolist()

    def lengths_out(self) -> list[int]:
        """Output tokens per sequence, read on the host."""
        return self.cu_seqlens_out.diff().tolist()

    def _owner(self) -> Tensor:
        """Output that each member belongs to, int64 ``[nnz]``."""
        counts = self.offset.diff().long()
        ids = torch.arange(self.num_out, device=self.device)
        return torch.repeat_interleave(ids, counts, output_size=self.member.shape[0])

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            cu_seqlens_in=self.cu_seqlens_in.to(device),
            cu_seqlens_out=self.cu_seqlens_out.to(device),
            anchor=self.anchor.to(device),
            csr_member=move(self.csr_member),
            csr_offset=move(self.csr_offset),
            csr_weight=move(self.csr_weight),
        )

    # ------------------------------------------------------------------ algebra
    def compose(self, then: Plan, *, partition: bool = False) -> Plan:
        """The plan that applies ``self`` and then ``then``; weights multiply.

        Args:
            then: takes the outputs of ``self``.
            partition: says that ``then`` puts each of them into exactly one output, as merging does; the
                number of members is then known without asking the device.

        Raises:
            ValueError: when ``then`` does not take what ``self`` gives.
        """
        if then.num_in != self.num_out or then.num_sequences != self.num_sequences:
            _check.fail(
                f"a plan over {self.num_out} tokens in {self.num_sequences} sequences",
                f"one over {then.num_in} tokens in {then.num_sequences}",
            )
        # On a GPU the comparison would wait for it; validate() is exact there.
        compare = self.device.type == "cpu" and not partition and not torch.compiler.is_compiling()
        if compare and not torch.equal(then.cu_seqlens_in, self.cu_seqlens_out):
            _check.fail(f"input offsets {self.cu_seqlens_out.tolist()}", str(then.cu_seqlens_in.tolist()))
        index = then.anchor.long()
        anchor = torch.where(index < 0, -1, self.anchor[index.clamp(min=0)]) if then.padded else self.anchor[index]
        member = offset = weight = None
        if not (self.is_gather and then.is_gather):
            total = self.member.shape[0] if partition else None
            member, weight, counts, ends = self._members_of(then.member.long(), total)
            weight = weight * torch.repeat_interleave(then.weight, counts, output_size=member.shape[0])
            offset = ends[then.offset.long()].to(torch.int32)
        return Plan(
            self.cu_seqlens_in,
            then.cu_seqlens_out,
            anchor.to(torch.int32),
            member,
            offset,
            weight,
            self.num_in,
            self.length_in,
            then.length_out,
            self.padded or then.padded,
        )

    def _members_of(self, outputs: Tensor, total: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Members and weights of the given outputs behind one another, how many each has, and where they begin."""
        start, counts = self.offset[:-1].long()[outputs], self.offset.diff().long()[outputs]
        ends = torch.zeros(outputs.shape[0] + 1, dtype=torch.int64, device=self.device)
        ends[1:] = counts.cumsum(0)
        if total is None:
            total = int(ends[-1])
        step = torch.repeat_interleave(start - ends[:-1], counts, output_size=total)
        flat = step + torch.arange(total, device=self.device)
        return self.member[flat], self.weight[flat], counts, ends

    def sorted(self) -> Plan:
        """The same plan with outputs ascending by anchor inside each sequence."""
        if self.padded:
            raise ValueError("expected a plan without left padding, got one made by lift(..., dense=True)")
        order = torch.argsort(self.anchor, stable=True)
        member = offset = weight = None
        if not self.is_gather:
            member, weight, _, ends = self._members_of(order, self.member.shape[0])
            offset = ends.to(torch.int32)
        return replace(self, anchor=self.anchor[order], csr_member=member, csr_offset=offset, csr_weight=weight)

    def unmerge(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """Give every input token a copy of the output it went into.

        Args:
            y: ``[M, C]``.
            fill: value for input tokens that were dropped.

        Returns:
            ``[N, C]``; a token in several outputs (overlapping pooling windows) gets their mean.
        """
        if y.dim() != 2 or y.shape[0] != self.num_out:
            _check.fail(f"y of shape [{self.num_out}, C]", str(list(y.shape)))
        member, owner = self.member.long(), self._owner()
        total = torch.zeros(self.num_in, y.shape[1], dtype=torch.float32, device=y.device)
        total.index_add_(0, member, y[owner].float())
        count = torch.bincount(member, minlength=self.num_in).unsqueeze(1)
        return torch.where(count > 0, total / count.clamp(min=1), fill).to(y.dtype)

    def trace(self, grid_thw: Tensor | Sequence[Sequence[int]]) -> list[list[tuple[int, int, int, int]]]:
        """For each output token its members as (video, frame, row, column), members ascending.

        Args:
            grid_thw: ``[V, 3]`` token grids in packed order; together they must cover the input.
        """
        rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
        grids = [tuple(int(v) for v in row) for row in rows]
        bounds = [0, *accumulate(t * h * w for t, h, w in grids)]
        if bounds[-1] != self.num_in:
            _check.fail(f"grids that hold {self.num_in} tokens together", f"{grids} with {bounds[-1]}")
        video = torch.bucketize(self.member.cpu().long(), torch.tensor(bounds[1:]), right=True).tolist()
        member, offset = self.member.tolist(), self.offset.tolist()
        cells = []
        for i, v in zip(member, video):
            _, h, w = grids[v]
            local = i - bounds[v]
            cells.append((v, local // (h * w), local // w % h, local % w))
        return [sorted(cells[a:b]) for a, b in zip(offset, offset[1:])]

    def lift(
        self,
        columns: Tensor,
        cu_seqlens: Tensor,
        *,
        real: Tensor | None = None,
        dense: bool = False,
        length: int | None = None,
        lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> Plan:
        """Turn a plan over visual tokens into one over whole rows; other tokens are kept as they are.

        Args:
            columns: int ``[N]``, packed row index of each visual token, ascending.
            cu_seqlens: int32 ``[R+1]``, offsets of the rows (``arange(R+1)·L`` for a dense batch).
            real: bool ``[total]``, False for padding tokens of the rows, which are left out.
            dense: give every row the length of the longest by left padding (anchor −1).
            length: that common length when the host knows it; read from the counts otherwise.
            lengths: tokens of each row before and after, when the host knows both and no row has
                padding: then nothing is read from the device, and a CUDA graph can be captured.

        Returns:
            A plan over the rows whose outputs ascend by anchor.
        """
        if self.padded:
            raise ValueError("expected a plan without left padding, got one made by lift(..., dense=True)")
        if columns.dim() != 1 or columns.shape[0] != self.num_in:
            _check.fail(f"columns of shape [{self.num_in}]", str(list(columns.shape)))
        device = self.device
        rows = cu_seqlens.shape[0] - 1
        if lengths is None:
            before, after = cu_seqlens.diff().tolist(), None
        else:
            before, after = list(lengths[0]), list(lengths[1])
            if real is not None or len(before) != rows or len(after) != rows:
                _check.fail(
                    f"lengths of {rows} rows without padding",
                    f"{len(before)} before and {len(after)} after{'' if real is None else ', with padding'}",
                )
            if sum(before) - sum(after) != self.num_in - self.num_out:
                _check.fail(f"lengths that fall by {self.num_in - self.num_out} together", f"{before} to {after}")
        total = sum(before)
        columns = columns.long()
        kept = torch.ones(total, dtype=torch.bool, device=device) if real is None else real.reshape(-1).bool().clone()
        if kept.shape[0] != total:
            _check.fail(f"real of {total} entries", str(list(kept.shape)))
        # An assignment would upload its value and wait for the GPU, which no capture allows.
        kept.index_fill_(0, columns, False)
        anchors = columns[self.anchor.long()]
        kept.index_fill_(0, anchors, True)
        slot = torch.full((total,), -1, dtype=torch.int64, device=device)
        slot[anchors] = torch.arange(self.num_out, device=device)
        position = compact(kept, None if after is None else sum(after))
        source = slot[position]
        row = _segment_ids(cu_seqlens, total)[position]
        if after is None:
            count = torch.bincount(row, minlength=rows)
        else:
            count = constant(after, torch.int64, device)
        if dense:
            width = length if length is not None else max(after) if after is not None else int(count.max())
            index = torch.full((rows, width), -1, dtype=torch.int64, device=device)
            ends = count.cumsum(0)
            rank = torch.arange(position.shape[0], device=device) - (ends - count)[row]
            index[row, width - count[row] + rank] = torch.arange(position.shape[0], device=device)
            index = index.reshape(-1)
            padded = position.shape[0] < rows * width
            cu_out = offsets([width] * rows, device)
        else:
            width, padded = None, False
            index = torch.arange(position.shape[0], device=device)
            cu_out = torch.zeros(rows + 1, dtype=torch.int32, device=device)
            cu_out[1:] = count.cumsum(0)
        here = index >= 0
        anchor = torch.where(here, position[index.clamp(min=0)], -1) if position.numel() else index
        member = offset = weight = None
        if not self.is_gather and self.num_out:
            source = torch.where(here, source[index.clamp(min=0)], -1) if source.numel() else index
            visual = source >= 0
            size = torch.where(visual, self.offset.diff().long()[source.clamp(min=0)], here.long())
            offset = torch.zeros(index.shape[0] + 1, dtype=torch.int32, device=device)
            offset[1:] = size.cumsum(0)
            nnz = self.member.shape[0] + position.shape[0] - self.num_out
            owner = torch.repeat_interleave(torch.arange(size.shape[0], device=device), size, output_size=nnz)
            inner = torch.arange(nnz, device=device) - offset.long()[owner]
            is_visual = visual[owner]
            flat = torch.where(is_visual, self.offset.long()[source.clamp(min=0)][owner] + inner, 0)
            member = torch.where(is_visual, columns[self.member.long()[flat]], anchor[owner]).to(torch.int32)
            weight = torch.where(is_visual, self.weight[flat], 1.0)
        return Plan(
            cu_seqlens.to(torch.int32),
            cu_out,
            anchor.to(torch.int32),
            member,
            offset,
            weight,
            total,
            before[0] if len(set(before)) == 1 else None,
            width,
            padded,
        )

    # ------------------------------------------------------------------ invariants
    def validate(self, *, ordered: bool = True) -> Plan:
        """Check every invariant exactly and return the plan; reads the tensors on the host.

        Args:
            ordered: also require anchors to ascend inside each sequence.

        Raises:
            ValueError: naming the first invariant that does not hold.
        """
        cu_in, cu_out = self.cu_seqlens_in.tolist(), self.cu_seqlens_out.tolist()
        _check.cu_seqlens(self.cu_seqlens_in.cpu(), self.num_in, "cu_seqlens_in")
        _check.cu_seqlens(self.cu_seqlens_out.cpu(), self.num_out, "cu_seqlens_out")
        if len(cu_in) != len(cu_out):
            _check.fail(f"cu_seqlens_out for {len(cu_in) - 1} sequences", str(len(cu_out) - 1))
        for name, cu, length in (("length_in", cu_in, self.length_in), ("length_out", cu_out, self.length_out)):
            if length is not None and any(b - a != length for a, b in zip(cu, cu[1:])):
                _check.fail(f"sequences of {name}={length} tokens", str([b - a for a, b in zip(cu, cu[1:])]))
        anchor, member, offset = self.anchor.tolist(), self.member.tolist(), self.offset.tolist()
        weight = self.weight.double()
        if len(offset) != len(anchor) + 1 or offset[0] != 0 or offset[-1] != len(member):
            _check.fail(f"offset [{len(anchor) + 1}] from 0 to {len(member)}", f"[{len(offset)}]")
        if weight.shape[0] != len(member):
            _check.fail(f"weight of shape [{len(member)}]", str(list(weight.shape)))
        if any(a > b for a, b in zip(offset, offset[1:])):
            raise ValueError("expected offset that never falls, got a falling one")
        sums = torch.zeros(len(anchor), dtype=torch.float64)
        sums.index_add_(0, self._owner().cpu(), weight.cpu())
        for b, (lo, hi) in enumerate(zip(cu_out, cu_out[1:])):
            before = -1
            for m in range(lo, hi):
                a = anchor[m]
                if a == -1 and self.padded and before == -1 and offset[m] == offset[m + 1]:
                    continue
                if not cu_in[b] <= a < cu_in[b + 1]:
                    _check.fail(f"anchor[{m}] inside sequence {b} [{cu_in[b]}, {cu_in[b + 1]})", str(a))
                if ordered and a <= before:
                    _check.fail(f"anchors that ascend in sequence {b}", f"{before} before {a}")
                before = a
                if offset[m] == offset[m + 1]:
                    _check.fail(f"members for output {m}", "none")
                for j in member[offset[m] : offset[m + 1]]:
                    if not cu_in[b] <= j < cu_in[b + 1]:
                        _check.fail(f"members of output {m} inside sequence {b}", str(j))
                if not abs(float(sums[m]) - 1.0) <= 1e-5:
                    _check.fail(f"weights of output {m} that sum to 1", f"{float(sums[m]):.8f}")
        return self


torch.export.register_dataclass(Plan, serialized_type_name="vidtok.Plan")
