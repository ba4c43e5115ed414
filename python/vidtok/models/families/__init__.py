"""Supported model classes, and where their visual tokens are."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

from torch import nn

from vidtok.models.families._base import Encoded, Family, Grid, Media, Places, Visual
from vidtok.models.families._find import (
    find_visual,
    has_media,
    named_arguments,
    refuse_blind,
    tag,
    tags,
    tower_inputs,
    without_newlines,
)
from vidtok.models.families._unsupported import UNSUPPORTED

__all__ = [
    "CORE", "FAMILIES", "REFUSED", "UNSUPPORTED", "Encoded", "Family", "Grid", "Media", "Places", "Visual",
    "find_visual", "has_media", "locate", "named_arguments", "refuse_blind", "supported", "tag", "tags", "tower_inputs",
    "without_newlines",
]  # fmt: skip


def _collect() -> dict[str, Family]:
    """The families that the modules of this package declare."""
    found: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update({family.name: family for family in module.FAMILIES})
    return found


#: Folder in transformers -> family.
FAMILIES: dict[str, Family] = _collect()

#: Families that every supported version of transformers is tested with, and that the command line loads.
CORE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

#: What is refused, and why: (what, transformers versions, reason).
REFUSED = (
    ("prefill_chunk_size", "all", "a chunk may end inside a video, and no version splits the pixels with it"),
    (
        "packed rows in a batch of several, with a mask or with a cache",
        "all",
        "samples are told apart by position_ids that restart, or cu_seq_lens, in one row without them",
    ),
    ("packed rows of models with recurrent layers", "all", "their states run on from sample to sample"),
    (
        "packed rows of Gemma 3, Gemma 4 and Molmo 2",
        "all",
        "the masks by which their frames see one another both ways do not part samples",
    ),
    (
        "packed rows of Cohere Compass, ERNIE and GLM-4V-MoE with flash attention and without cu_seq_lens",
        "all",
        "their layers are given no text positions",
    ),
    (
        "packed rows by cu_seq_lens with flash attention in Qwen2.5-VL and its like",
        "5.17",
        "the unreduced model hands them to its vision tower and raises; position_ids alone are enough",
    ),
    ("logits_to_keep as a tensor", "all", "its indices count tokens that may have been dropped"),
    ("later passes with position_ids of the whole sequence", "all", "the unreduced model takes them for this pass"),
    ("video without M-RoPE positions (no mm_token_type_ids)", "5.x", "the unreduced model silently falls back to 1-D"),
    ("torch.compile(fullgraph=True)", "all", "plans have sizes that only the data knows"),
    ("nn.DataParallel", "all", "its replicas share one model object; use DistributedDataParallel"),
    ("prompt-learning PEFT adapters", "all", "virtual tokens shift the columns of the prompt"),
    ("beam search and num_return_sequences with Qwen3-VL videos", "4.57", "the unreduced model raises in generate"),
    (
        "beam search with frames that come as images (InternVL, Gemma 3)",
        "4.57, 5.17",
        "the unreduced model gives the beams of a row frames of other rows",
    ),
    ("beam search with GLM videos", "5.23", "the unreduced model loses the features of videos in generate"),
    ("images beside videos with GLM-4V and GLM-OCR", "all", "the unreduced model raises: both have one placeholder"),
    ("generate() on a later turn with a new video", "4.57", "the unreduced model drops its pixels"),
    ("a decoding loop of one's own without cache_position", "4.57", "the unreduced model restarts positions at 0"),
    ("pickling a cache that holds a reduced prompt", "all", "only an attached model can continue it"),
    ("static caches with drops inside the decoder", "4.57", "all layers of a static cache share one length there"),
    (
        "assisted decoding of Qwen2-VL with attn",
        "4.57",
        "its forward is not told how many candidates follow the prompt, so the last of them asks",
    ),
    (
        "new videos in a later turn with attn",
        "all",
        "scores would miss the tokens in the cache",
    ),
    (
        "new videos in a later turn that put padding into sliding windows",
        "all",
        "windows count columns, and rows would lose different numbers of them",
    ),
    (
        "drops inside the decoder among the layers of deepstack (Qwen3-VL and its like)",
        "all",
        "visual features are added to all visual tokens after each of those layers",
    ),
    ("static and quantised caches with compress=True", "all", "their layers cannot be shortened after they are filled"),
    ("tuples and EncoderDecoderCache as past_key_values", "all", "they are not the cache of a decoder"),
    ("forwards replaced from outside of transformers", "all", "what hooks rely on is known of tested forwards only"),
)


def supported() -> str:
    """Names of the supported classes, for messages."""
    return ", ".join(name for family in FAMILIES.values() for name in family.heads or (family.base,))


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


def locate(model: Any) -> Places:
    """Find the modules to hook, through PEFT, DDP, FSDP, DeepSpeed and torch.compile wrappers.

    Raises:
        ValueError: naming the supported classes, for any other model.
    """
    inner = _unwrap(model)
    names = {cls.__name__ for cls in type(inner).__mro__}
    for family in FAMILIES.values():
        if names & set(family.heads):
            base = inner if family.base in names else _unwrap(getattr(inner, family.inner))
            if family.flat and family.base not in {cls.__name__ for cls in type(base).__mro__}:
                return _places(replace(family, language=family.flat), inner, inner)
            return _places(family, inner, base)
        if family.base in names:
            return _places(family, None, inner)
    raise ValueError(f"expected one of {supported()} (or its base model), got {type(inner).__name__}")


def _places(family: Family, outer: nn.Module | None, base: Any) -> Places:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < family.since:
        raise ValueError(
            f"expected transformers {'.'.join(map(str, family.since))} or later for {type(base).__name__}, "
            f"got {transformers.__version__}"
        )
    if family.language and not hasattr(base, family.language):
        raise ValueError(
            f"expected a model with .{family.language}, as transformers 4.57 and later have it, "
            f"got {type(base).__name__} without it"
        )
    towers = [getattr(base, name, None) for name in family.towers]
    language_model = getattr(base, family.language) if family.language else base
    return Places(family, outer, base, language_model, tuple(t for t in towers if t is not None))
