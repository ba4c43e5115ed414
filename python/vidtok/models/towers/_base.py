"""How a vision tower of transformers is written, for merging its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from vidtok.merge.attach import Merging
from vidtok.merge.block import Halves
from vidtok.models.towers._heads import Head


def _one(tower: nn.Module) -> int:
    return 1


@dataclass(frozen=True)
class Tower:
    """One kind of vision tower.

    Args:
        name: as in docs/vision.md.
        towers: class names of the module that one forward pass of the tower calls.
        blocks: dotted names of the list of blocks, the first that is there counts.
        halves: the two halves of a block; see :class:`vidtok.merge.Halves`.
        attention: the modules of a block that call transformers' attention interface.
        prefix: how many tokens at the start are class, register or prompt tokens.
        full_length: whether what follows the tower needs every token.
        extras: what else has to change, such as a pooling head: each is given the tower and its
            :class:`vidtok.merge.Merging` and gives back what undoes it.
        kind: what merges its tokens.
        heads: models around the tower that pool its tokens.
        dense: class names of models around the tower that read every token.
        package: the package whose class it has to be, where others have classes of these names.
    """

    name: str
    towers: tuple[str, ...]
    blocks: tuple[str, ...]
    halves: Halves
    attention: Callable[[nn.Module], Sequence[nn.Module]]
    prefix: Callable[[nn.Module], int] = _one
    full_length: bool = False
    extras: tuple[Callable[[nn.Module, Any], Callable[[], None]], ...] = ()
    kind: type[Merging] = Merging
    heads: tuple[Head, ...] = ()
    dense: tuple[str, ...] = ()
    package: str = ""

    def find_blocks(self, tower: nn.Module) -> Sequence[nn.Module]:
        """The blocks of ``tower`` in order."""
        for name in self.blocks:
            try:
                return [getattr(block, "_orig_mod", block) for block in attrgetter(name)(tower)]
            except AttributeError:
                continue
        raise ValueError(f"expected {type(tower).__name__} to have blocks at {' or '.join(self.blocks)}, got none")
