"""What belongs to one forward pass of a tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidtok import ops
from vidtok.merge import attention
from vidtok.merge.options import ToMe
from vidtok.ops.position_remap import position_remap
from vidtok.plan import Plan


class Run:
    """Sizes at the entry of every block, and what the merges of one forward pass decided."""

    def __init__(
        self, options: ToMe, merges: tuple[int, ...], protected: int | Tensor, keep_plans: bool, follow: bool = False
    ) -> None:
        layers = len(merges)
        self.options, self.merges, self.keep_plans, self.follow = options, merges, keep_plans, follow
        self.size: list[Tensor | None] = [None] * (layers + 1)
        self.protected: list[int | Tensor] = [protected] * (layers + 1)
        self.plans: list[Plan | None] = [None] * layers
        #: int64 ``[B, T]``, which token of the tower's entry each one stands in the place of; with ``follow``.
        self.place: list[Tensor | None] = [None] * (layers + 1)
        #: Tokens of a sequence that enter each block's MLP, and the first block.
        self.tokens: list[int] = [0] * (layers + 1)
        #: Whether attention is PyTorch's, whose forward pass has the same bits with and without gradients: a
        #: checkpoint runs a block both ways, and both must merge the same tokens.
        self.trained = False
        #: The block that comes next, and how many sequences the first one got.
        self.next = self.batch = 0

    def step(self, index: int) -> Step:
        return Step(self, index)

    def plan(self, start: int = 0, stop: int | None = None) -> Plan | None:
        """The composed plan of blocks ``start`` to ``stop``; None where nothing merged."""
        plan: Plan | None = None
        for step in self.plans[start:stop]:
            if step is not None:
                plan = step if plan is None else plan.compose(step, partition=True)
        return plan

    def full(self, index: int, x: Tensor) -> Tensor:
        """What enters block ``index``, a copy for every token that was merged."""
        return x if x.shape[-2] == self.tokens[0] else unmerge(self.plan(stop=index), x)


class Step:
    """One block of a run: its attention half reports keys here, and tokens merge after it.

    ``size`` is fp32 ``[B, T]``, how many tokens each one stands for, None while all stand for themselves.
    """

    __slots__ = ("index", "metric", "noted", "run")

    def __init__(self, run: Run, index: int) -> None:
        self.run, self.index = run, index
        self.metric: Tensor | None = None
        #: Whether the attention half has reported its keys.
        self.noted = False

    @property
    def idle(self) -> bool:
        """Whether the block merges nothing and its tokens all stand for themselves: the attention may be as it was."""
        return self.run.merges[self.index] <= 0 and self.size is None

    @property
    def free(self) -> bool:
        """Whether attention may be another than PyTorch's: as near to softmax, with other bits."""
        return self._works and not self.run.trained

    @property
    def _works(self) -> bool:
        run = self.run
        return run.merges[self.index] > 0 or (self.size is not None and run.options.prop_attn)

    @property
    def silent(self) -> bool:
        """Whether the attention half has not reported what merging and weighing by size need."""
        return not self.noted and self._works

    @property
    def size(self) -> Tensor | None:
        return self.run.size[self.index]

    @property
    def place(self) -> Tensor | None:
        """int64 ``[B, T]``, the place that each token had at the tower's entry, a merged one its destination's.

        None while every token is in its own; known to runs that follow places.
        """
        return self.run.place[self.index]

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Take ``[B, H, T, D]`` keys and values for the similarity, whose mean over heads is compared."""
        self.noted = True
        if self.run.merges[self.index] > 0 and self.run.options.metric != "hidden":
            self.metric = (keys if self.run.options.metric == "keys" else values).detach()

    def weights(self, keys: Tensor) -> Tensor | None:
        """How often attention counts each of ``keys`` ``[B, H, T, D]``: fp32 ``[B, T]``, None for once each."""
        return self.size if self.run.options.prop_attn else None

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        attend: attention.Attend | None = None,
        flash: bool = False,
    ) -> Any:
        r"""Attention whose keys weigh by size: :math:`softmax(q k^T scale + mask + \log size) v`.

        Args:
            q, k, v: ``[B, H, T, D]``; k and v may have fewer heads where ``attend`` allows it.
            mask: additive or bool, broadcast to ``[B, H, T, T]``.
            scale: 1/√D when None.
            attend: ``(q, k, v, mask, scale)`` that does it; by default PyTorch's fused attention, or vidtok's own
                where a pass without gradients merges and that is faster.
            flash: whether ``attend`` takes no additive mask.
        """
        self.note(k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        size = self.weights(k)
        if attend is None:
            attend = attention.sdpa if self.free else attention.plain
        if size is None:
            return attend(q, k, v, mask, scale)
        form = attention.choose(self.run.options.form, q.device, flash)
        return attention.FORMS[form](attend, q, k, v, size, mask, scale)

    def merge(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` with its r most similar pairs merged."""
        run, i = self.run, self.index
        r, protected = run.merges[i], run.protected[i]
        if r > 0:
            metric = self.metric if self.metric is not None else x
            self.metric = None
            x, run.size[i + 1], plan = ops.bipartite_merge(x, metric, r, size=run.size[i], protected=protected)
            run.plans[i] = plan if run.keep_plans else None
            if run.follow:
                place = run.place[i]
                if place is None:
                    place = torch.arange(run.tokens[0], device=x.device).expand(x.shape[0], -1).contiguous()
                (moved,) = position_remap(plan, place.reshape(-1))
                run.place[i + 1] = moved.view(x.shape[:-1])
            if isinstance(protected, Tensor):
                (kept,) = position_remap(plan, protected.reshape(-1))
                protected = kept.view(x.shape[:-1])
        else:
            run.size[i + 1], run.place[i + 1] = run.size[i], run.place[i]
        run.protected[i + 1], run.tokens[i + 1] = protected, x.shape[-2]
        return x


def owners(plan: Plan) -> Tensor:
    """int64 ``[N]``, the output that each input of a plan of merges went into."""
    owner = torch.repeat_interleave(plan.offset.diff().long(), output_size=plan.num_in)
    return torch.empty_like(owner).index_copy_(0, plan.member.long(), owner)


def unmerge(plan: Plan | None, y: Tensor) -> Tensor:
    """``[B, T', C]`` at the places of the tokens that were merged into it, ``[B, T, C]``; packed ``[M, C]`` alike."""
    if plan is None:
        return y
    rows = y.reshape(-1, y.shape[-1])
    out = rows.index_select(0, owners(plan))
    return out if y.dim() == 2 else out.view(y.shape[0], -1, y.shape[-1])


def weighted_mean(x: Tensor, size: Tensor | None, skip: int = 0) -> Tensor:
    r"""Mean of ``[B, T, C]`` over tokens from ``skip`` on, each counted ``size`` ``[B, T]`` times."""
    x = x[:, skip:]
    if size is None:
        return x.mean(1)
    weight = size[:, skip:]
    # Autocast would take the sum to half precision.
    with torch.autocast(x.device.type, enabled=False):
        return (torch.einsum("btc,bt->bc", x.float(), weight) / weight.sum(1, keepdim=True)).to(x.dtype)
