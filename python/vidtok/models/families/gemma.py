"""Google's models: frames lie in stretches of their own, and the base makes the attention masks."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidtok.models import cache as caches
from vidtok.models.families._base import Family, Grid, Media
from vidtok.models.families._runs import frame_units, square


def _frames(media: Media) -> list[tuple[Tensor, Grid]]:
    """Stretches of one frame each; how many make a video, the call says or the features made before it."""
    runs = media.runs()
    if media.kind == "image":
        counts = [1] * len(runs)
    elif media.encoded is None:
        counts = [int(n) for n in media.arguments["num_frames_per_video"].tolist()]
    else:
        counts, left = [], [r.numel() for r in runs]
        for part in media.encoded.pooler_output:
            taken = 0
            while left and sum(left[:taken]) < part.shape[0]:
                taken += 1
            counts.append(taken)
            left = left[taken:]
    if sum(counts) != len(runs):
        raise ValueError(
            f"expected {sum(counts)} stretches of {media.kind} tokens, one for each frame, got {len(runs)} "
            "(prefill_chunk_size and truncated prompts cannot be reduced)"
        )
    shapes = _shapes(media, len(runs))
    units, first = [], 0
    for count in counts:
        own = runs[first : first + count]
        if own:
            tokens = own[0].numel()
            height, width = shapes[first] if shapes else (0, 0)
            units.append(
                (
                    torch.cat(own),
                    (count, height, width) if height * width == tokens else (count, *square(tokens)),
                )
            )
        first += count
    return units


def _shapes(media: Media, frames: int) -> list[tuple[int, int]]:
    """Height and width in tokens of each frame, where the call says them."""
    if media.encoded is None:
        places = media.arguments.get(f"{media.kind}_position_ids")
    else:
        names = ("pixel_position_ids", "image_position_ids")
        places = next((p for p in map(media.input, names) if p is not None), None)
    if places is None or len(places) != frames:
        return []
    real = (places >= 0).all(-1).sum(-1)
    most = places.amax(1) + 1
    pool = getattr(media.module.config.vision_config, "pooling_kernel_size", 1)
    if getattr(media.module.config.vision_config, "model_patch_size", None):
        pool = 1
    return [(y // pool, x // pool) if n else (0, 0) for (x, y), n in zip(most.tolist(), real.tolist())]


def _masks(
    base: Any, arguments: dict[str, Any], types: Tensor | None, always: bool = False, everywhere: bool = False
) -> Any:
    """The masks that the base would make for reduced rows.

    Args:
        base: the base model.
        arguments: of the language model, with the 2-D mask of the reduced rows.
        types: ``[B, L']``, kinds of the tokens; None when the call gave none.
        always: whether the tokens of a frame see each other whatever the config says.
        everywhere: whether they do in layers of full attention too, in masks that ``generate`` has not made.
    """
    source = sys.modules[next(c for c in type(base).__mro__ if c.__module__.startswith("transformers.")).__module__]
    config = base.config.get_text_config()
    embeds = arguments["inputs_embeds"]
    names = ("attention_mask", "past_key_values", "position_ids")
    given = {"config": config, "inputs_embeds": embeds, **{n: arguments.get(n) for n in names}}
    if types is not None and (always or getattr(config, "use_bidirectional_attention", None) == "vision"):
        blocks = source.get_block_sequence_ids_for_mask(types, device=embeds.device)
        # What ``generate`` makes for a static cache leaves layers of full attention causal.
        if everywhere and not caches.is_static(given["past_key_values"]):
            return source.create_masks_for_generate(block_sequence_ids=blocks, **given)
        return source.create_masks_for_vision_model(block_sequence_ids=blocks, **given)
    return source.create_masks_for_generate(**given)


FAMILIES = (
    Family(
        "gemma3",
        "Gemma3Model",
        ("Gemma3ForConditionalGeneration",),
        frame_units(),
        towers=("vision_tower",),
        positions="rope",
        base_masks=True,
        masks=partial(_masks, always=True),
        frames=True,
        since=(5, 17),
    ),
    Family(
        "gemma3n",
        "Gemma3nModel",
        ("Gemma3nForConditionalGeneration",),
        frame_units(),
        towers=("vision_tower",),
        positions="rope",
        frames=True,
        since=(5, 17),
    ),
    Family(
        "gemma4",
        "Gemma4Model",
        ("Gemma4ForConditionalGeneration",),
        _frames,
        towers=("vision_tower",),
        positions="rope",
        base_masks=True,
        masks=_masks,
        since=(5, 23),
    ),
    Family(
        "gemma4_unified",
        "Gemma4UnifiedModel",
        ("Gemma4UnifiedForConditionalGeneration",),
        _frames,
        towers=("embed_vision",),
        positions="rope",
        base_masks=True,
        masks=partial(_masks, everywhere=True),
        since=(5, 23),
    ),
)
