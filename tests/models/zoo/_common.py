"""What the tiny families share: text config, sharp weights, padding, patches on a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import tiny
from tests.models.tiny import Clip

PAD, IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END, AUDIO = 0, 250, 251, 252, 253, 248, 249, 247
VERSION = tiny.VERSION
ROWS = tiny.ROWS
#: Three rows of equal frames and sizes, for families whose pixels are one dense tensor.
EVEN: list[list[Clip]] = [[("video", 4, 56)], [("video", 4, 56), ("video", 4, 56)], [("video", 4, 56)]]
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids", "labels")


def text_config(layers: int = 2, **options: Any) -> dict[str, Any]:
    """Arguments of a small text config; ``options`` come last."""
    return {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": PAD, **options,
    }  # fmt: skip


def rope(**options: Any) -> dict[str, Any]:
    """Rotary arguments of a text config on the installed version."""
    if VERSION[0] == 4:
        part = {k: options.pop(k) for k in ("partial_rotary_factor",) if k in options}
        return {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", **options}, **part}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **options}}


def ids(**more: int) -> dict[str, int]:
    """Special tokens of the grid families."""
    return {"image_token_id": IMAGE, "video_token_id": VIDEO, **more}


def build(model_class: Any, config: Any, attention: str = "sdpa", seed: int = 0, **scales: float) -> Any:
    """A sharpened random model of this config."""
    torch.manual_seed(seed)
    config._attn_implementation = attention
    return sharpen(model_class(config), **scales)


def sharpen(model: nn.Module, qk: float = 6.0, other: float = 2.5) -> Any:
    """Scale random weights until a wrong mask, position or pixel shows in the logits."""
    model.eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or (p.ndim == 3 and "expert" in name):
                p.mul_(qk if any(s in name for s in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")) else other)
    generation: Any = model.generation_config
    generation.pad_token_id, generation.eos_token_id = PAD, None
    generation.suppress_tokens = [IMAGE, VIDEO, START, END, VIDEO_START, VIDEO_END, AUDIO]
    return model


def words(n: int, g: torch.Generator) -> list[int]:
    """Random text tokens."""
    return torch.randint(5, 240, (n,), generator=g).tolist()


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of ragged rows."""
    length = max(map(len, rows))
    full = [[PAD] * (length - len(r)) + r if side == "left" else r + [PAD] * (length - len(r)) for r in rows]
    real = [[0] * (length - len(r)) + [1] * len(r) for r in rows]
    real = real if side == "left" else [r[::-1] for r in real]
    return {"input_ids": torch.tensor(full), "attention_mask": torch.tensor(real)}


def alone(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The entries of row ``i`` that have one value per token, without padding."""
    real = inputs["attention_mask"][i].bool()
    return {k: inputs[k][i : i + 1, real] for k in PER_TOKEN if k in inputs}


def clip(i: int, j: int, count: int, side: int) -> Tensor:
    """Real frames of clip ``j`` of row ``i``: fp32 ``[T, 3, side, side]`` in [-1, 1]."""
    return tiny.frames(count, side, 7 * i + 3 * j)


def patchify(x: Tensor, patch: int = 14, merge: int = 2, temporal: int = 2) -> tuple[Tensor, list[int]]:
    """Patches ``[t·h·w, C·temporal·patch²]`` in the order of the Qwen processors, and their grid ``[t, h, w]``."""
    if x.shape[0] % temporal:
        x = torch.cat([x, x[-1:].expand(temporal - x.shape[0] % temporal, -1, -1, -1)])
    t, c, h, w = x.shape
    gt, gh, gw = t // temporal, h // patch, w // patch
    x = x.reshape(gt, temporal, c, gh // merge, merge, patch, gw // merge, merge, patch)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(gt * gh * gw, -1).contiguous(), [gt, gh, gw]


def grid_batch(
    samples: list[list[Clip]],
    side: str = "left",
    seed: int = 10,
    *,
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    stamps: bool = False,
    video: int = VIDEO,
    image: int = IMAGE,
    frame: tuple[int, int] = (START, END),
    around: tuple[int, ...] = (),
    types: bool = True,
    over: int = 1,
    last: bool = False,
    seconds: str = "",
    order: int | None = None,
) -> dict[str, Tensor]:
    """Processor output of a family whose pixels are patches with ``*_grid_thw``.

    Args:
        samples: rows of clips.
        side: of the padding.
        seed: of the text.
        patch: pixels of a patch's side.
        merge: patches of a token's side.
        temporal: frames of a patch.
        stamps: whether each frame stands alone, behind two text tokens and between ``frame``.
        video: placeholder of a video's tokens.
        image: placeholder of an image's tokens.
        frame: tokens before and after an image or a frame (or, without stamps, a whole video).
        around: tokens before and after all frames of a video; empty for none.
        types: whether ``mm_token_type_ids`` are given.
        over: frames that become one token.
        last: whether the values of a patch end with the channels.
        seconds: name of an argument with the seconds of each video's grid steps; empty for none.
        order: patches of the side of a block that lies together, when it is not ``merge``.
    """
    pixels: dict[str, list[Tensor]] = {"video": [], "image": []}
    grids: dict[str, list[list[int]]] = {"video": [], "image": []}
    rows, kinds = [], []
    for i, clips in enumerate(samples):
        g = torch.Generator().manual_seed(seed + i)
        row = [(w, 0) for w in words(3, g)]
        for j, (what, count, size) in enumerate(clips):
            frames = clip(i, j, count if what == "video" else 1, size)
            if what == "video" and count % (temporal * over):
                frames = torch.cat([frames, frames[-1:].expand(-count % (temporal * over), -1, -1, -1)])
            patches, (t, h, w) = patchify(frames, patch, order or merge, temporal)
            if last:
                patches = patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
            pixels[what].append(patches)
            grids[what].append([t, h, w])
            per, kind = h * w // merge**2, 2 if what == "video" else 1
            begin, end = (frame[0], 0), (frame[1], 0)
            if what == "image":
                row += [begin, *[(image, 1)] * per, end]
                row += [(w, 0) for w in words(2, g)]
                continue
            row += [(a, 0) for a in around[:1]]
            if stamps:
                for _ in range(t // over):
                    row += [*((w, 0) for w in words(2, g)), begin, *[(video, kind)] * per, end]
            else:
                row += [begin, *[(video, kind)] * (t // over * per), end]
            row += [(a, 0) for a in around[1:]] + [(w, 0) for w in words(2, g)]
        row += [(w, 0) for w in words(4 + 2 * i, g)]
        rows.append([token for token, _ in row])
        kinds.append([kind for _, kind in row])
    out = padded(rows, side)
    if types and VERSION[0] > 4:
        out["mm_token_type_ids"] = padded(kinds, side)["input_ids"].int()
    if pixels["video"]:
        out |= {"pixel_values_videos": torch.cat(pixels["video"]), "video_grid_thw": torch.tensor(grids["video"])}
    if pixels["image"]:
        out |= {"pixel_values": torch.cat(pixels["image"]), "image_grid_thw": torch.tensor(grids["image"])}
    if seconds:
        out[seconds] = torch.ones(len(grids["video"]))
    return out


def grid_row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    """Row ``i`` of such a batch without its padding."""
    out = alone(inputs, i)
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        counts = [sum(clip[0] == kind for clip in clips) for clips in samples]
        if not counts[i]:
            continue
        first = sum(counts[:i])
        grids = inputs[f"{kind}_grid_thw"]
        sizes = grids.prod(-1).tolist()
        start = sum(sizes[:first])
        out[f"{kind}_grid_thw"] = grids[first : first + counts[i]]
        for name in ("second_per_grid_ts", "video_second_per_grid"):
            if kind == "video" and name in inputs:
                out[name] = inputs[name][first : first + counts[i]]
        out[pixels] = inputs[pixels][start : start + sum(sizes[first : first + counts[i]])]
    return out


def dense_row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int, *names: str) -> dict[str, Tensor]:
    """Row ``i`` where ``names`` hold one entry per video (or image) of the batch."""
    first = sum(len(clips) for clips in samples[:i])
    return {**alone(inputs, i), **{n: inputs[n][first : first + len(samples[i])] for n in names if n in inputs}}
