"""InternVideo2's stage-2 vision encoder, which is vidtok's own module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vidtok.merge.run import Step, unmerge
from vidtok.models.towers._base import Tower
from vidtok.models.towers._override import override


class InternVideo2Block:
    """The block has its halves itself."""

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        return block.attend(x, step)

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.feed(x)


def _ends(tower: Any, merging: Any) -> Callable[[], None]:
    """Weigh by size what is pooled, after whichever block it is."""

    def encode(tower: Any, own: Any, *args: Any) -> Tensor:
        x = own(*args)
        run = merging.run
        if merging.full_length and run.next < merging.layers:
            x = unmerge(run.plan(stop=run.next), x)
        return x

    def pool(tower: Any, own: Any, x: Tensor) -> Tensor:
        size = merging.size
        # Tokens of elsewhere, or all of them, are counted once.
        return own(x) if size is None or size.shape != x.shape[:2] else tower.clip_projector(x, size)

    return override(tower, encode=encode, pool=pool)


def _none(block: nn.Module) -> list[nn.Module]:
    return []


FAMILIES = (
    Tower(
        "internvideo2",
        ("InternVideo2",),
        ("blocks",),
        InternVideo2Block(),
        _none,
        extras=(_ends,),
        package="vidtok",
    ),
)
