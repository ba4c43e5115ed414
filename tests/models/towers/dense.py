"""Tiny dense towers, and their forward pass written with loops over one image."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.merge.reference import attention, match, merge

LAYERS, HEADS, WIDTH, SIDE, PATCH = 3, 4, 32, 24, 4
#: Merges of the three layers in most tests.
MERGES = [6, 5, 4]
COMMON = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
NEW = int(transformers.__version__.split(".")[0]) > 4


@dataclass(frozen=True)
class Kind:
    """A family: its class names, what its config needs besides, tokens in front, and the model that pools."""

    model: str
    config: str
    prefix: int
    options: dict[str, Any] = field(default_factory=dict)
    pooled: str = ""
    norm: str = ""


KINDS = {
    "clip": Kind("CLIPVisionModel", "CLIPVisionConfig", 1, {}, "CLIPForImageClassification"),
    "siglip": Kind("SiglipVisionModel", "SiglipVisionConfig", 0, {}, "SiglipForImageClassification", "post_layernorm"),
    "siglip2": Kind(
        "Siglip2VisionModel", "Siglip2VisionConfig", 0, {"num_patches": 36}, "Siglip2ForImageClassification",
        "post_layernorm",
    ),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", 1, {"mlp_ratio": 2}, "Dinov2ForImageClassification", "layernorm"),
    "dinov2_with_registers": Kind(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 4, {"mlp_ratio": 2, "num_register_tokens": 3},
        "Dinov2WithRegistersForImageClassification", "layernorm",
    ),
    "dinov3_vit": Kind("DINOv3ViTModel", "DINOv3ViTConfig", 4, {"num_register_tokens": 3}, "", "norm"),
    "vit": Kind("ViTModel", "ViTConfig", 1, {}, "", "layernorm"),
    "deit": Kind("DeiTModel", "DeiTConfig", 2, {}, "", "layernorm"),
    "videomae": Kind(
        "VideoMAEModel", "VideoMAEConfig", 0, {"num_frames": 4, "tubelet_size": 2, "image_size": 16},
        "VideoMAEForVideoClassification",
    ),
}  # fmt: skip


def sharpen(model: Any) -> Any:
    """Weights of one scale on every version, with which masks and sizes matter."""
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lambda" in name:
            p.data = 0.5 + torch.rand(p.shape, generator=g)
        elif any(part in name for part in ("_token", "probe", "position_embedding")):
            p.data = 0.5 * torch.randn(p.shape, generator=g)
        elif p.dim() > 1:
            sharp = 1.5 if any(part in name for part in ("q_proj", "k_proj", "query", "key", "in_proj")) else 0.8
            p.data = sharp * p[0].numel() ** -0.5 * torch.randn(p.shape, generator=g)
        elif "bias" in name or "embedding" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    return model.eval()


def make(kind: str, implementation: str = "sdpa", **options: Any) -> Any:
    """A tower."""
    family = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**{**COMMON, **family.options, **options})
    config._attn_implementation = implementation
    return sharpen(getattr(transformers, family.model)(config).float())


def pooled(kind: str, implementation: str = "sdpa") -> Any:
    """The model around a tower that pools its tokens itself."""
    family = KINDS[kind]
    torch.manual_seed(0)
    config: Any = getattr(transformers, family.config)(**{**COMMON, **family.options}, num_labels=5)
    if "lip" in kind:
        whole = family.config.replace("Vision", "")
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = getattr(transformers, whole)(
            vision_config={**COMMON, **family.options}, text_config={**text, "vocab_size": 64}, num_labels=5
        )
        config.vision_config._attn_implementation = implementation
    config._attn_implementation = implementation
    return sharpen(getattr(transformers, family.pooled)(config).float())


def inputs(kind: str, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """What a tower is called with."""
    g = torch.Generator().manual_seed(seed)
    if kind == "videomae":
        return {"pixel_values": torch.randn(batch, 4, 3, 16, 16, generator=g)}
    if kind == "siglip2":
        return {
            "pixel_values": torch.randn(batch, 36, 3 * PATCH * PATCH, generator=g),
            "pixel_attention_mask": torch.ones(batch, 36, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[6, 6]] * batch),
        }
    return {"pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=g)}


def of(row: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One row of a batch."""
    return {name: value[row : row + 1] for name, value in given.items()}


def core(model: Any) -> Any:
    """The module that holds embeddings and blocks."""
    for name in ("vision_model", "dinov2", "dinov2_with_registers", "vit", "deit", "videomae"):
        model = getattr(model, name, model)
    return getattr(model, "vision_model", model)


def blocks(tower: Any) -> Any:
    for path in ("encoder.layers", "encoder.layer", "model.layer", "layers", "layer"):
        found = tower
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError("expected blocks")


def embed(tower: Any, given: dict[str, Tensor]) -> Tensor:
    pixels = given["pixel_values"]
    if "spatial_shapes" in given:
        return tower.embeddings(pixels, given["spatial_shapes"])
    if pixels.dim() == 5:
        return tower.embeddings(pixels, None)
    x = tower.embeddings(pixels)
    return tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x


def part(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def project(block: Any, y: Tensor) -> list[Tensor]:
    """Queries, keys and values ``[H, T, D]``."""
    own = part(block, "self_attn", "attention")
    own = getattr(own, "attention", own)
    out = []
    for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        z = part(own, *names)(y)
        # transformers 4 keeps two of VideoMAE's biases beside its layers.
        bias = getattr(own, f"{names[1][0]}_bias", None)
        z = z if bias is None else z + bias
        out.append(z.unflatten(-1, (HEADS, -1)).transpose(0, 1))
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@dataclass
class Loops:
    """One image through a tower with merging: tokens after the last block and its norm, their sizes and places."""

    x: Tensor
    size: Tensor
    place: list[int]
    states: list[Tensor]
    #: Of every token at the start, which of those after a block it went into.
    owners: list[list[int]]


def by_loops(
    model: Any,
    given: dict[str, Tensor],
    merges: list[int],
    prefix: int,
    *,
    prop_attn: bool = True,
    metric: str = "keys",
    held: Callable[[list[int]], set[int]] | None = None,
    hidden: Callable[[int], bool] = lambda place: False,
) -> Loops:
    """The tower's forward pass over one image.

    Args:
        held: positions now that stay, besides the prefix, from the places that tokens had at the start.
        hidden: whether the token of a place is padding, which nobody attends to.
    """
    tower = core(model)
    x = embed(tower, given)[0]
    rope = tower.rope_embeddings(given["pixel_values"]) if hasattr(tower, "rope_embeddings") else None
    size, place, states, owners = torch.ones(x.shape[0]), list(range(x.shape[0])), [x], [list(range(x.shape[0]))]
    for r, block in zip(merges, blocks(tower), strict=True):
        y = part(block, "layer_norm1", "norm1", "layernorm_before")(x)
        q, k, v = project(block, y)
        if rope is not None:
            for t, was in enumerate(place):
                if was >= prefix:
                    cos, sin = (table[was - prefix] for table in rope)
                    q, k = q.clone(), k.clone()
                    q[:, t], k[:, t] = turn(q[:, t], cos, sin), turn(k[:, t], cos, sin)
        seen = torch.tensor([0.0 if hidden(p) else 1.0 for p in place])
        out = attention(q, k, v, (size if prop_attn else 1) * seen, q.shape[-1] ** -0.5)
        own = part(block, "self_attn", "attention")
        last = part(own, "out_proj", "o_proj", "output")
        out = getattr(last, "dense", last)(out.transpose(0, 1).flatten(1))
        x = x + out * (block.layer_scale1.lambda1 if hasattr(block, "layer_scale1") else 1)
        similar = {"keys": k.mean(0), "values": v.mean(0), "hidden": x}[metric].detach()
        stay = {*range(prefix), *(held(place) if held else ())}
        stay |= {t for t, was in enumerate(place) if hidden(was)}
        order, gone = match(similar, r, stay)
        owners.append([order.index(gone.get(t, t)) for t in owners[-1]])
        x, size = merge(x, similar, size, r, stay)
        place = [place[i] for i in order]
        y = part(block, "layer_norm2", "norm2", "layernorm_after")(x)
        y = block.mlp(y) if hasattr(block, "mlp") else block.output.dense(block.intermediate(y))
        x = x + y * (block.layer_scale2.lambda1 if hasattr(block, "layer_scale2") else 1)
        states.append(x)
    for name in ("post_layernorm", "layernorm", "norm"):
        norm = getattr(tower, name, None)
        if norm is not None and not hasattr(tower, "pre_layrnorm"):
            x = norm(x)
    return Loops(x, size, place, states, owners)


def by_query(head: Any, x: Tensor, size: Tensor) -> Tensor:
    """SigLIP's pooling head over one image's tokens, each counted ``size`` times."""
    own = head.attention
    weights, biases = own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)
    q, k, v = (
        (y @ w.t() + b).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        for y, w, b in zip((head.probe[0], x, x), weights, biases, strict=True)
    )
    y = own.out_proj(attention(q, k, v, size, q.shape[-1] ** -0.5).transpose(0, 1).flatten(1))
    return (y + head.mlp(head.layernorm(y)))[0]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors are equal up to a relative error."""
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


def available(kind: str) -> bool:
    """Whether the installed transformers has the family."""
    return importlib.util.find_spec(f"transformers.models.{kind}") is not None


#: The kinds that this version of transformers has.
NAMES = [name for name in KINDS if available(name)]


def masked() -> list[str]:
    """Families whose towers take a mask of padding from the caller on this version."""
    towers = {kind: getattr(transformers, KINDS[kind].model) for kind in KINDS if available(kind)}
    return [kind for kind, tower in towers.items() if "attention_mask" in inspect.signature(tower.forward).parameters]
