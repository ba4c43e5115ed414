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


class PackedPreNorm:
    """The same where the parts are named as CLIP's, and attention may return its weights too."""

    def attend(self, block: Any, x: Tensor, step: Step, *args: Any, **kwargs: Any) -> Any:
        out = call(block.self_attn, step, block.layer_norm1(x), *args, **kwargs)
        return x + (out[0] if isinstance(out, tuple) else out)

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.mlp(block.layer_norm2(x))


def none(tower: nn.Module) -> int:
    return 0


def deepstack(tower: Any, merging: Any) -> Callable[[], None]:
    """The mergers that read what earlier blocks give get every token."""
    mergers = list(getattr(tower, "deepstack_merger_list", None) or ())
    return read_after(mergers, list(getattr(tower, "deepstack_visual_indexes", ()))[: len(mergers)], merging)


def _attn(block: Any) -> list[Any]:
    return [block.attn]


def _self_attn(block: Any) -> list[Any]:
    return [block.self_attn]


_BLOCKS = ("blocks", "layers", "encoder.layers")


def _tower(name: str, tower: str) -> Tower:
    options: Any = {"full_length": True, "extras": (deepstack,), "kind": PackedMerging}
    if name in ("video_llama_3", "cosmos3_edge"):
        return Tower(name, (tower,), _BLOCKS, PackedPreNorm(), _self_attn, none, **options)
    return Tower(name, (tower,), _BLOCKS, Packed(), _attn, none, **options)


FAMILIES = tuple(
    _tower(name, tower)
    for name, tower in (
        ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
        ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
        ("qwen2_5_omni", "Qwen2_5OmniVisionEncoder"),
        ("qwen3_vl", "Qwen3VLVisionModel"),
        ("qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
        ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder"),
        ("qwen3_5", "Qwen3_5VisionModel"),
        ("qwen3_5_moe", "Qwen3_5MoeVisionModel"),
        ("qwen4_exp", "Qwen4ExpVisionModel"),
        ("glm4v", "Glm4vVisionModel"),
        ("glm4v_moe", "Glm4vMoeVisionModel"),
        ("glm_ocr", "GlmOcrVisionModel"),
        ("glm5_next", "Glm5NextVisionModel"),
        ("exaone4_5", "Exaone4_5_VisionModel"),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel"),
        ("cohere_compass", "CohereCompassVisionModel"),
        ("cosmos3_edge", "Cosmos3EdgeVisionModel"),
        ("dots3_note", "Dots3NoteVisionModel"),
        ("kimi_k25", "Kimi_K25VisionModel"),
        ("muse_glimmer", "MuseGlimmerVisionModel"),
        ("muse_spark", "MuseSparkVisionModel"),
        ("video_llama_3", "VideoLlama3VisionModel"),
    )
)
