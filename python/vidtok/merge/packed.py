"""Token merging in towers whose sequences lie behind one another: windows and frames of ``cu_seqlens``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check, ops
from vidtok._constant import constant
from vidtok.merge.attach import Merging
from vidtok.merge.options import ToMe
from vidtok.merge.run import Run, Step, owners
from vidtok.ops.bipartite import prefix_merge_count
from vidtok.plan import Plan, offsets

_POSITIONS = ("position_embeddings", "rotary_pos_emb")


class PackedRun(Run):
    """Sizes, borders and places at the entry of every block of one pass over packed tokens ``[N, C]``.

    A segment is what the first block attends inside: a window, or a frame where there are no windows. The segments of
    every later block, windows or the frames that they lie in, are unions of these.
    """

    def __init__(self, options: ToMe, layers: int, cu_seqlens: Tensor, protected: int) -> None:
        borders = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(borders)]
        counts = {n: options.schedule.counts(layers, n, min(protected, n)) for n in set(lengths)}
        #: Merges of every segment, for each block.
        self.counts = [tuple(counts[n][layer] for n in lengths) for layer in range(layers)]
        super().__init__(options, tuple(max(c, default=0) for c in self.counts), protected, True)
        #: Where the segments begin and end at the entry of every block.
        self.borders: list[list[int]] = [borders]
        for count in self.counts:
            gone = [0, *accumulate(count)]
            self.borders.append([border - n for border, n in zip(self.borders[-1], gone, strict=True)])
        self.tokens = [b[-1] for b in self.borders]
        #: Of each token of the tower, the one that stands for it; of each token, whose place it has. None: its own.
        self.owner: list[Tensor | None] = [None] * (layers + 1)
        self.anchor: list[Tensor | None] = [None] * (layers + 1)
        #: The number of a border, and the borders of the sequences that each block attends inside, before any merge.
        self.number = {border: i for i, border in enumerate(borders)}
        self.attended: list[list[int]] = [borders] * layers
        self._known: list[tuple[Tensor, list[int]]] = [(cu_seqlens, borders)]

    def step(self, index: int) -> PackedStep:
        return PackedStep(self, index)

    def plan(self, start: int = 0, stop: int | None = None) -> Plan | None:
        """The plan of plain means from the tower's tokens to those after block ``stop``."""
        if start:
            _check.fail("a plan that starts at the tower's tokens", f"one from block {start} on")
        at = len(self.counts) if stop is None else stop
        owner, anchor = self.owner[at], self.anchor[at]
        if owner is None or anchor is None:
            return None
        cu = [self._lengths(i, owner.device) for i in (0, at)]
        return Plan.from_assignment(owner, anchor, cu[0], cu[1], self.tokens[0], partition=True)

    def full(self, index: int, x: Tensor) -> Tensor:
        """What enters block ``index``, a copy for every token that was merged."""
        owner = self.owner[index]
        return x if owner is None or x.shape[0] == self.tokens[0] else x.index_select(0, owner)

    # A compiled tower breaks its graph where borders are read and tokens merge: only the data knows the sizes.
    @torch.compiler.disable
    def arguments(self, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the tower hands to block ``index``, for the tokens that are left."""
        borders, anchor = self._borders(index, kwargs["cu_seqlens"]), self.anchor[index]
        if anchor is None:
            return kwargs
        kwargs = dict(kwargs)
        kwargs["cu_seqlens"] = constant(borders, torch.int32, kwargs["cu_seqlens"].device)
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = max((stop - start for start, stop in pairwise(borders)), default=0)
        for name in _POSITIONS:
            value = kwargs.get(name)
            if isinstance(value, Tensor):
                kwargs[name] = value.index_select(0, anchor)
            elif value is not None:
                kwargs[name] = tuple(part.index_select(0, anchor) for part in value)
        return kwargs

    def _lengths(self, index: int, device: torch.device) -> Tensor:
        return offsets([stop - start for start, stop in pairwise(self.borders[index])], device)

    def _borders(self, index: int, cu_seqlens: Tensor) -> list[int]:
        """Where the sequences that the tower names begin and end at the entry of block ``index``."""
        own = next((borders for known, borders in self._known if known is cu_seqlens), None)
        if own is None:
            own = cu_seqlens.tolist()
            self._known.append((cu_seqlens, own))
        self.attended[index] = own
        try:
            return [self.borders[index][self.number[border]] for border in own]
        except KeyError as error:
            raise ValueError(
                f"expected sequences of whole segments of the first block in block {index}, got a border at token "
                f"{error.args[0]} inside one"
            ) from None


class PackedStep(Step):
    """One block of a :class:`PackedRun`; attention over all tokens, or over sequence after sequence, in order."""

    __slots__ = ("at", "parts")
    run: PackedRun

    def __init__(self, run: PackedRun, index: int) -> None:
        super().__init__(run, index)
        self.at = 0
        self.parts: list[Tensor] = []

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Take ``[1, H, L, D]`` of the next sequences."""
        self.noted = True
        if self.run.merges[self.index] > 0 and self.run.options.metric != "hidden":
            self.parts.append((keys if self.run.options.metric == "keys" else values)[0].detach())

    def weights(self, keys: Tensor) -> Tensor | None:
        """As :meth:`Step.weights`, of the next ``L`` tokens: keys ``[1, H, L, D]``."""
        start, self.at = self.at, self.at + keys.shape[-2]
        size = super().weights(keys)
        return None if size is None else size[None, start : self.at]

    @torch.compiler.disable
    def merge(self, x: Tensor) -> Tensor:
        """``[N, C]`` with the most similar pairs of every segment merged."""
        run, i = self.run, self.index
        if not run.merges[i]:
            run.size[i + 1], run.owner[i + 1], run.anchor[i + 1] = run.size[i], run.owner[i], run.anchor[i]
            return x
        metric = torch.cat(self.parts, 1) if self.parts else x
        self.parts = []
        x, size, plan = _merge(x, metric, run.size[i], run.counts[i], run.borders[i : i + 2], run.protected[i])
        place = owners(plan)
        anchor, before = plan.anchor.long(), (run.owner[i], run.anchor[i])
        run.size[i + 1] = size
        run.owner[i + 1] = place if before[0] is None else place.index_select(0, before[0])
        run.anchor[i + 1] = anchor if before[1] is None else before[1].index_select(0, anchor)
        return x


def _merge(
    x: Tensor, metric: Tensor, size: Tensor | None, counts: Sequence[int], borders: Sequence[list[int]], protected: Any
) -> tuple[Tensor, Tensor, Plan]:
    """``counts`` merges in the segments between ``borders[0]``."""
    lengths = [stop - start for start, stop in pairwise(borders[0])]
    cu, r = constant(borders[0], torch.int32, x.device), max(counts)
    if all(prefix_merge_count(n, r, protected) == count for n, count in zip(lengths, counts, strict=True)):
        return ops.bipartite_merge(x, metric, r, size=size, protected=protected, cu_seqlens=cu)
    return _by_count(x, metric, size, counts, borders, protected)


def _by_count(
    x: Tensor, metric: Tensor, size: Tensor | None, counts: Sequence[int], borders: Sequence[list[int]], protected: Any
) -> tuple[Tensor, Tensor, Plan]:
    """The same where segments merge different numbers: those with the same number together."""
    size = torch.ones(x.shape[0], device=x.device) if size is None else size
    parts, places = [], []
    for r in sorted(set(counts)):
        same = [i for i, count in enumerate(counts) if count == r]
        rows, outs = (
            torch.tensor([j for i in same for j in range(border[i], border[i + 1])], device=x.device)
            for border in borders
        )
        places.append(outs)
        part, mass = x.index_select(0, rows), size.index_select(0, rows)
        if not r:
            # They keep their order, as where no segment merges.
            parts.append((part, mass, rows, rows, outs))
            continue
        cu = offsets([borders[0][i + 1] - borders[0][i] for i in same], x.device)
        part, mass, plan = ops.bipartite_merge(
            part, metric.index_select(-2, rows), r, size=mass, protected=protected, cu_seqlens=cu
        )
        owner = torch.repeat_interleave(plan.offset.diff().long(), output_size=plan.num_in)
        parts.append((part, mass, rows[plan.anchor.long()], rows[plan.member.long()], outs[owner]))
    values, sizes, anchors, members, owners = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.cat(places).argsort()
    ends = [offsets([stop - start for start, stop in pairwise(border)], x.device) for border in borders]
    plan = Plan.from_assignment(owners[members.argsort()], anchors[order], ends[0], ends[1], x.shape[0], partition=True)
    return values.index_select(0, order), sizes.index_select(0, order), plan


class PackedMerging(Merging):
    """Token merging in a tower of packed sequences: ``r`` merges in every window, or frame where there are no windows.

    ``ratio`` and ``k`` are of a segment too. A merged token has the rotary position of its destination, and the keys
    are compared as attention sees them, rotated. Block arguments by keyword: ``cu_seqlens``, and
    ``position_embeddings`` or ``rotary_pos_emb`` with one entry per token.
    """

    def __init__(
        self,
        tower: nn.Module,
        blocks: Sequence[nn.Module],
        halves: Any,
        options: ToMe,
        prefix: int = 0,
        full_length: bool = True,
    ) -> None:
        name = type(tower).__name__
        if isinstance(options.protected, Tensor):
            raise ValueError(
                f"expected protected as a number of tokens in front of each window or frame of {name}, got a mask"
            )
        full = set(getattr(tower, "fullatt_block_indexes", None) or ())
        if 0 in full and len(full) < len(blocks):
            raise ValueError(f"expected {name} to attend inside windows in its first block, got full attention there")
        super().__init__(tower, blocks, halves, options, prefix, full_length)

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
        """The run that a block's call belongs to; the first block begins one."""
        self._cu_seqlens = kwargs["cu_seqlens"]
        return super().enter(index, args, kwargs)

    @torch.compiler.disable
    def begin(self, x: Tensor, real: Tensor | None = None) -> Run:
        """The run of a pass whose first block gets ``x`` ``[N, C]``."""
        return PackedRun(self.options, self.layers, self._cu_seqlens, self.prefix + int(self.options.protected))

    def forward(self, block: nn.Module, run: Run, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert isinstance(run, PackedRun)
        return super().forward(block, run, index, args, run.arguments(index, kwargs))
