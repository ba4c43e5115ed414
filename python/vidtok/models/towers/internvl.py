"""InternVL's own vision tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidtok.merge.run import Step
from vidtok.models.towers._attention import call
from vidtok.models.towers._base import Tower


class Scaled:
    """``x + lambda_1 attention(norm(x))``, then ``x + lambda_2 mlp(norm(x))``."""

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        out = call(block.attention, step, block.layernorm_before(x), *args, **kwargs)
        return block.lambda_1 * out[0] + x

    def feed(self, block: Any, x: Tensor) -> Tensor:
        out = block.dropout(block.mlp(block.layernorm_after(x)))
        return x + (out if block.lambda_2 is None else block.lambda_2 * out)


def _attention(block: Any) -> list[Any]:
    return [block.attention]


FAMILIES = (Tower("internvl", ("InternVLVisionModel",), ("encoder.layer",), Scaled(), _attention),)
