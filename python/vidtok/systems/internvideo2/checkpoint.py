"""Published weights of InternVideo2's vision encoder, with every key accounted for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vidtok import _check
from vidtok.systems.internvideo2.config import InternVideo2Config
from vidtok.systems.internvideo2.model import InternVideo2
from vidtok.systems.internvideo2.positions import resample

_MARK = "patch_embed.proj.weight"
# Heads that only training against teachers reads.
_TRAINING = (
    "clip_decoder.",
    "final_clip_decoder.",
    "clip_pos_embed",
    "clip_img_pos_embed",
    "mae_decoder.",
    "mae_pos_embed",
)
_TIMED = {"pos_embed": 1, "pos_embed_temporal": 0}


def _own(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder's own keys of a state dict, without what the whole model puts before them."""
    for name in ("module", "model", "state_dict"):
        if isinstance(state.get(name), Mapping):
            return _own(state[name])
    marks = [key for key in state if key == _MARK or key.endswith("." + _MARK)]
    # Teachers and momentum copies may be in a whole model as well.
    named = [key for key in marks if key.endswith("vision_encoder." + _MARK)]
    marks = named if len(named) == 1 else marks
    if len(marks) != 1:
        _check.fail(f"a state dict with one {_MARK}", f"{len(marks)} among {len(state)} keys")
    prefix = marks[0][: -len(_MARK)]
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    # Beside the encoder's, a whole model without a prefix would have keys of its text encoder: those are unexpected.
    return {key: value for key, value in own.items() if not key.startswith(_TRAINING)}


def read_config(state: Mapping[str, Any], **changes: Any) -> InternVideo2Config:
    """The sizes that the shapes of a state dict tell.

    Args:
        state: a published state dict, whole or of the encoder.
        changes: what shapes do not tell: ``num_heads`` and ``attn_pool_num_heads`` (16), ``img_size`` (224),
            ``num_frames`` where the embedding of places is joint and patches are not of 224 pixels.

    Raises:
        ValueError: a state dict without the encoder's keys.
    """
    own = _own(state)
    channels, in_chans, tubelet, patch, _ = own[_MARK].shape
    blocks = {int(m[1]) for key in own if (m := re.match(r"blocks\.(\d+)\.", key))}
    pool = own.get("clip_projector.cross_attn.proj.weight")
    first = own.get("blocks.0.mlp.fc1.weight")
    separate = "pos_embed_spatial" in own
    if not blocks or pool is None or first is None or not (separate or "pos_embed" in own):
        missing = [n for n in ("blocks.0.mlp.fc1.weight", "clip_projector.cross_attn.proj.weight") if n not in own]
        _check.fail("the keys of an InternVideo2 vision encoder", f"none of {', '.join(missing) or 'pos_embed'}")
    side = int(changes.get("img_size", 224)) // patch
    if separate:
        side, time = round(own["pos_embed_spatial"].shape[1] ** 0.5), own["pos_embed_temporal"].shape[1]
    else:
        time = (own["pos_embed"].shape[1] - 1) // max(1, side * side)
    found = InternVideo2Config(
        in_chans=in_chans,
        patch_size=patch,
        img_size=side * patch,
        num_frames=max(1, time) * tubelet,
        tubelet_size=tubelet,
        embed_dim=channels,
        depth=max(blocks) + 1,
        num_heads=changes.pop("num_heads", 16),
        attn_pool_num_heads=changes.pop("attn_pool_num_heads", 16),
        mlp_ratio=first.shape[0] / channels,
        qkv_bias="blocks.0.attn.qkv.bias" in own,
        qk_normalization="blocks.0.attn.q_norm.weight" in own,
        init_values=1e-5 if "blocks.0.ls1.gamma" in own else None,
        clip_embed_dim=pool.shape[0],
        sep_pos_embed=separate,
        sep_image_video_pos_embed="img_pos_embed" in own,
    )
    return replace(found, **changes) if changes else found


def _first(names: Iterable[str]) -> str:
    names = sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def load_state_dict(model: InternVideo2, state: Mapping[str, Any], interpolate: bool = False) -> None:
    """Fill ``model`` with a published state dict, in which exactly its keys have to be.

    The key map, which is the identity once the prefix is off (``vision_encoder.`` in a whole model; ``module.`` and
    the wrappers ``{"module": …}`` and ``{"model": …}`` go as well):

    ====================================================  =======================================================
    ``patch_embed.proj.{weight,bias}``                    ``[C, 3, tubelet, patch, patch]``
    ``cls_token``                                         ``[1, 1, C]``
    ``pos_embed``, and ``img_pos_embed`` of images        ``[1, 1 + T·H·W, C]``, ``[1, 1 + H·W, C]``
    ``pos_embed_{cls,spatial,temporal}``, in their place  ``[1, 1, C]``, ``[1, H·W, C]``, ``[1, T, C]``
    ``blocks.N.norm{1,2}.weight``                         ``[C]``
    ``blocks.N.attn.qkv.weight``                          ``[3C, C]``: queries, keys, values
    ``blocks.N.attn.{q,k}_norm.weight``                   ``[C]``, over all heads
    ``blocks.N.attn.proj.{weight,bias}``                  ``[C, C]``
    ``blocks.N.ls{1,2}.gamma``                            ``[C]``
    ``blocks.N.mlp.fc{1,2}.{weight,bias}``                ``[6144, C]``, ``[C, 6144]``
    ``clip_projector.norm1_{q,k,v}.{weight,bias}``        ``[C]``
    ``clip_projector.cross_attn.{q,k,v}.weight``          ``[C, C]``, with the biases ``cross_attn.{q,k,v}_bias``
    ``clip_projector.cross_attn.proj.{weight,bias}``      ``[768, C]``
    ====================================================  =======================================================

    Left out are ``clip_decoder.*``, ``final_clip_decoder.*``, ``clip_pos_embed``, ``clip_img_pos_embed`` and
    ``mae_*``, which only training against teachers reads.

    No published file was at hand when this was written: the names and shapes above, the order of queries, keys and
    values, which keys belong to training, the epsilons (1e-6 in RMSNorm, 1e-5 in the pool) and the positions of
    an image without ``img_pos_embed`` are from the published description, not checked against a real checkpoint.
    Compare ``tokens`` with the original's once before relying on them.

    Args:
        model: with the sizes of the weights; :func:`read_config` reads them.
        state: a published state dict, whole or of the encoder.
        interpolate: whether an embedding of places for another frame count is interpolated along time.

    Raises:
        ValueError: keys or shapes that differ, the first ten of them named.
    """
    own, wanted = _own(state), model.state_dict()
    if interpolate:
        own = {key: _timed(key, value, wanted, model.config) for key, value in own.items()}
    missing, extra = wanted.keys() - own.keys(), own.keys() - wanted.keys()
    shapes = {k for k in wanted.keys() & own.keys() if wanted[k].shape != own[k].shape}
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {what} ({_first(keys)})"
            for what, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        if shapes:
            differ = {f"{k} {list(own[k].shape)} for {list(wanted[k].shape)}" for k in shapes}
            parts.append(f"{len(shapes)} of another shape ({_first(differ)})")
        hint = "; interpolate=True fits another frame count" if shapes and shapes <= _TIMED.keys() else ""
        _check.fail(f"the {len(wanted)} keys of InternVideo2 with depth {model.config.depth}", "; ".join(parts) + hint)
    # A model on the meta device has nothing to copy into.
    model.load_state_dict(own, assign=model.cls_token.is_meta)


def _timed(key: str, value: Tensor, wanted: Mapping[str, Tensor], config: InternVideo2Config) -> Tensor:
    if key not in _TIMED or key not in wanted or wanted[key].shape == value.shape:
        return value
    time, rows, columns = config.grid
    prefix = _TIMED[key]
    per_step = rows * columns if key == "pos_embed" else 1
    steps, rest = divmod(value.shape[1] - prefix, per_step)
    return value if rest or steps < 1 else resample(value, steps, time, prefix)


def load(path: str | os.PathLike[str], interpolate: bool = False, **changes: Any) -> InternVideo2:
    """The encoder with the weights of a file, in evaluation.

    Args:
        path: a ``.safetensors`` file, or a pickle of tensors (``.pt``, ``.pth``, ``.bin``).
        interpolate: whether the embedding of places is interpolated along time for another ``num_frames``.
        changes: what :func:`read_config` takes, and ``num_frames``.

    Raises:
        ValueError: a file that is missing, or keys that differ.

    Example:
        >>> model = load("InternVideo2-stage2_1b-224p-f4.pt").bfloat16()  # doctest: +SKIP
        >>> with vidtok.attach(model, vision="tome:r=20"):  # doctest: +SKIP
        ...     tokens, pooled = model(clip)
    """
    path = Path(path)
    if not path.is_file():
        _check.fail("a file of weights", f"none at {path}")
    if path.suffix == ".safetensors":
        state: Mapping[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = InternVideo2(read_config(state, **changes))
    load_state_dict(model, state, interpolate)
    return model.eval()
