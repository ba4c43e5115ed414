"""Towers over packed patches: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and those that are written as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vidtok.merge.packed import PackedMerging
from vidtok.merge.run import Step
from vidtok.models.towers._attention import call
from vidtok.models.towers._base import Tower
from vidtok.models.towers._full import read_after


class Packed:
    """``x + attn(norm1(x))`` inside the sequences of ``cu_seqlens``, then ``x + mlp(norm2(x))``."""

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        return x + call(block.attn, step, block.norm1(x), *args, **kwargs)

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp(block.norm2(x))


def attention(block: nn.Module) -> list[Any]:
    return [block.attn]


def none(tower: nn.Module) -> int:
    return 0


def deepstack(tower: Any, merging: Any) -> Callable[[], None]:
    """The mergers that read what earlier blocks give get every token."""
    mergers = list(getattr(tower, "deepstack_merger_list", None) or ())
    return read_after(mergers, list(getattr(tower, "deepstack_visual_indexes", ()))[: len(mergers)], merging)


def _tower(name: str, *towers: str) -> Tower:
    return Tower(
        name, towers, ("blocks",), Packed(), attention, none, full_length=True, extras=(deepstack,), kind=PackedMerging
    )


FAMILIES = (
    _tower("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    _tower("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
    _tower("qwen2_5_omni", "Qwen2_5OmniVisionEncoder"),
    _tower("qwen3_vl", "Qwen3VLVisionModel"),
    _tower("qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
    _tower("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder"),
    _tower("qwen3_5", "Qwen3_5VisionModel"),
    _tower("qwen3_5_moe", "Qwen3_5MoeVisionModel"),
    _tower("qwen4_exp", "Qwen4ExpVisionModel"),
    _tower("glm4v", "Glm4vVisionModel"),
    _tower("glm4v_moe", "Glm4vMoeVisionModel"),
    _tower("glm_ocr", "GlmOcrVisionModel"),
    _tower("glm5_next", "Glm5NextVisionModel"),
    _tower("exaone4_5", "Exaone4_5_VisionModel"),
    _tower("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel"),
)
