"""What belongs to one forward pass of an attached model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidtok.models.cache import State
from vidtok.models.families import Visual
from vidtok.models.packed import Packed
from vidtok.models.report import Record, Span
from vidtok.models.tokens import Tokens


class Call:
    """One forward pass of a model in one thread."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.begun = False
        self.labels: Tensor | None = None
        self.logits_to_keep: Any = 0
        self.router_loss = False
        self.visual: Visual | None = None
        self.media = False
        self.mask: Tensor | None = None
        self.types: Tensor | None = None
        self.towers: dict[str, list[dict[str, Any]]] = {}
        self.encoded: list[Span] = []
        self.state: State | None = None
        self.record: Record | None = None
        self.stage = ""
        self.forward: Span | None = None
        self.rotary: Tensor | None = None
        self.tokens: Tokens | None = None
        self.run: Any = None
        self.packed: Packed | None = None
