"""Supported model classes, and where their visual tokens are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.models import cache as caches
from vidtok.models.report import Span, Unit

#: Model type -> stem of its class names in transformers.
FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}

#: What is refused, and why: (what, transformers versions, reason).
REFUSED = (
    ("prefill_chunk_size", "all", "a chunk may end inside a video, and no version splits the pixels with it"),
    ("packed rows (cu_seq_lens, restarting position ids, 4-D masks)", "all", "rows of a batch are told apart by mask"),
    ("logits_to_keep as a tensor", "all", "its indices count tokens that may have been dropped"),
    ("later passes with position_ids of the whole sequence", "all", "the unreduced model takes them for this pass"),
    ("video without M-RoPE positions (no mm_token_type_ids)", "5.x", "the unreduced model silently falls back to 1-D"),
    ("torch.compile(fullgraph=True)", "all", "plans have sizes that only the data knows"),
    ("nn.DataParallel", "all", "its replicas share one model object; use DistributedDataParallel"),
    ("prompt-learning PEFT adapters", "all", "virtual tokens shift the columns of the prompt"),
    ("beam search and num_return_sequences with Qwen3-VL videos", "4.57", "the unreduced model raises in generate"),
    ("generate() on a later turn with a new video", "4.57", "the unreduced model drops its pixels"),
    ("a decoding loop of one's own without cache_position", "4.57", "the unreduced model restarts positions at 0"),
    ("pickling a cache that holds a reduced prompt", "all", "only an attached model can continue it"),
)

_TAG = "_vidtok_encoded"


@dataclass(frozen=True)
class Places:
    """The modules that hooks go on."""

    outer: nn.Module | None
    base: nn.Module
    language_model: nn.Module
    vision: nn.Module


@dataclass(frozen=True)
class Visual:
    """Visual tokens of a batch: packed row columns, and the videos or images they belong to."""

    columns: Tensor
    units: list[Unit]


@dataclass(frozen=True)
class Encoded:
    """Grids and time of a vision tower call, carried by its output object until the prefill."""

    grid_thw: Tensor
    span: Span | None


def supported() -> str:
    """Names of the supported classes, for messages."""
    return ", ".join(f"{stem}ForConditionalGeneration" for stem in FAMILIES.values())


def _unwrap(model: Any) -> Any:
    seen = 0
    while seen < 8:
        seen += 1
        if isinstance(model, nn.DataParallel):
            raise ValueError("expected a plain or DistributedDataParallel model, got nn.DataParallel")
        if hasattr(model, "_orig_mod"):
            if getattr(getattr(model, "dynamo_ctx", None), "fullgraph", False):
                raise ValueError(
                    "expected a compiled model that may break its graph, got torch.compile(fullgraph=True), and plans "
                    "have sizes that only the data knows"
                )
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            configs = model.peft_config
            configs = configs.values() if isinstance(configs, dict) else [configs]
            if any(getattr(c, "is_prompt_learning", False) for c in configs):
                raise ValueError("expected a PEFT adapter that leaves the prompt alone, got a prompt-learning one")
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            break
    return model


def _names(model: Any) -> set[str]:
    return {cls.__name__ for cls in type(model).__mro__}


def locate(model: Any) -> Places:
    """Find the modules to hook, through PEFT, DDP, FSDP, DeepSpeed and torch.compile wrappers.

    Raises:
        ValueError: naming the supported classes, for any other model.
    """
    inner = _unwrap(model)
    names = _names(inner)
    for stem in FAMILIES.values():
        if f"{stem}ForConditionalGeneration" in names:
            return _places(inner, _unwrap(inner.model))
        if f"{stem}Model" in names:
            return _places(None, inner)
    raise ValueError(f"expected one of {supported()} (or its base model), got {type(inner).__name__}")


def _places(outer: nn.Module | None, base: Any) -> Places:
    if not hasattr(base, "language_model") or not hasattr(base, "visual"):
        raise ValueError(
            "expected a model with .visual and .language_model, as transformers 4.57 and later have it, "
            f"got {type(base).__name__} without them"
        )
    return Places(outer, base, base.language_model, base.visual)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    if not args:
        return kwargs
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    return {**dict(zip(names, args)), **kwargs}


def tag(output: Any, encoded: Encoded) -> None:
    """Let the output object of a vision tower carry its grids; ``generate`` hands over nothing else."""
    if hasattr(output, "pooler_output"):
        setattr(output, _TAG, encoded)


def tags(arguments: dict[str, Any]) -> tuple[dict[str, list[list[int]]], list[Span]]:
    """Grids by kind, and times, of the vision tower calls whose outputs came with the arguments."""
    grids, spans = {}, []
    for kind, output in (arguments.get("mm_encoder_outputs") or {}).items():
        encoded: Encoded | None = getattr(output, _TAG, None)
        if encoded is None:
            continue
        rows = encoded.grid_thw.tolist()
        # Beam search repeats the features of a sample behind one another; the tensors are the same objects.
        order: dict[int, int] = {}
        grids[kind] = [rows[order.setdefault(id(part), len(order))] for part in output.pooler_output]
        if encoded.span is not None:
            spans.append(encoded.span)
    return grids, spans


def has_media(arguments: dict[str, Any]) -> bool:
    """Whether pixels or their features come with this call."""
    return (
        arguments.get("pixel_values_videos") is not None
        or arguments.get("pixel_values") is not None
        or bool(arguments.get("mm_encoder_outputs"))
    )


def refuse_blind(module: Any, arguments: dict[str, Any]) -> None:
    """Raise for a prompt whose video tokens come without pixels, as prefill_chunk_size makes them on 5.17."""
    ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
    if ids is None or ids.shape[1] < 2 or cache is None or caches.physical_length(cache):
        return
    if bool((ids == module.config.video_token_id).any()):
        raise ValueError(
            "expected pixels with the video tokens of a new prompt, got none (prefill_chunk_size cannot be reduced)"
        )


def find_visual(
    module: Any, arguments: dict[str, Any], images: bool, encoded_grids: dict[str, list[list[int]]]
) -> Visual | None:
    """Visual tokens of a call to the base model that are open to reduction, in packed order.

    Args:
        module: the base model.
        arguments: of its forward call, by name.
        images: whether images are open to reduction too.
        encoded_grids: grids of features that were made before the call, by kind.
    """
    config, ids, embeds = module.config, arguments.get("input_ids"), arguments.get("inputs_embeds")
    encoded = arguments.get("mm_encoder_outputs") or {}
    merge = config.vision_config.spatial_merge_size
    found: list[tuple[int, Tensor, Unit]] = []
    length = ids.shape[1] if ids is not None else embeds.shape[1]  # type: ignore[union-attr]
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        if kind == "image" and not images:
            continue
        grids = arguments.get(f"{kind}_grid_thw")
        if encoded.get(kind) is not None and kind in encoded_grids:
            grids = encoded_grids[kind]
        elif encoded.get(kind) is None and arguments.get(pixels) is None:
            continue
        elif grids is not None:
            grids = grids.tolist()
        else:
            raise ValueError(
                f"expected visual features with their grids ({kind}_grid_thw), got features made before attach or "
                "split by prefill_chunk_size, which cannot be reduced"
            )
        token = getattr(config, f"{kind}_token_id")
        if ids is not None:
            place = ids == token
        else:
            vector = module.get_input_embeddings()(torch.tensor(token, device=embeds.device))  # type: ignore[union-attr]
            place = (embeds == vector).all(-1)
        columns = torch.nonzero(place.reshape(-1)).squeeze(1)
        merged = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in grids]
        sizes = [t * h * w for t, h, w in merged]
        if sum(sizes) != columns.shape[0]:
            raise ValueError(
                f"expected {sum(sizes)} {kind} tokens for grids {grids}, got {columns.shape[0]} in this call "
                "(prefill_chunk_size and truncated prompts cannot be reduced)"
            )
        parts = columns.split(sizes)
        starts = torch.stack([p[0] for p in parts if p.numel()]).tolist() if columns.numel() else []
        parts = [p for p in parts if p.numel()]
        merged = [g for g, n in zip(merged, sizes) if n]
        found += [(s, p, Unit(kind, s // length, g)) for s, p, g in zip(starts, parts, merged)]
    if not found:
        return None
    found.sort(key=lambda item: item[0])
    return Visual(torch.cat([p for _, p, _ in found]), [u for _, _, u in found])
