"""Frames to Qwen2-VL, Qwen2.5-VL and Qwen3-VL patches, as the Hugging Face processors make them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidtok.data.video import resize_frames

__all__ = ["PatchSpec", "Patches", "patchify", "smart_resize"]

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Patches(NamedTuple):
    """fp32 ``[t·h·w, 3·temporal·patch·patch]`` patches in the model's order, and the patch grid (t, h, w)."""

    pixel_values_videos: Tensor
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class PatchSpec:
    """How one model family resizes, normalises and cuts video.

    Args:
        patch_size: pixels along a patch.
        temporal_patch_size: frames in a patch.
        merge_size: patches along a token of the language model.
        min_pixels: least pixels of a frame (of the whole video when ``whole_video``).
        max_pixels: most pixels, counted the same way.
        mean: per channel, of values in [0, 1].
        std: per channel.
        whole_video: pixels are counted over all frames (Qwen3-VL) and not per frame (Qwen2-VL, Qwen2.5-VL).
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 28 * 28 * 768
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    whole_video: bool = False

    @property
    def factor(self) -> int:
        """Pixels along one token."""
        return self.patch_size * self.merge_size

    def size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames are resized to."""
        return smart_resize(
            height,
            width,
            factor=self.factor,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            num_frames=num_frames if self.whole_video else None,
            temporal_patch_size=self.temporal_patch_size,
        )

    @classmethod
    def for_model(cls, config: Any, folder: str | os.PathLike[str] | None = None) -> PatchSpec:
        """The processor defaults of a model, changed by its config and by the processor files in ``folder``.

        Args:
            config: a ``transformers`` config with ``model_type`` and ``vision_config``.
            folder: checkpoint folder; ``video_preprocessor_config.json``, ``processor_config.json`` or
                ``preprocessor_config.json`` are read there, the first that exists.

        Raises:
            ValueError: for a model family that is not Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        """
        kind = str(getattr(config, "model_type", ""))
        if not kind.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")):
            raise ValueError(f"expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, got model type {kind!r}")
        vision = config.vision_config
        spec = cls()
        if kind.startswith("qwen3_vl"):
            half = (0.5, 0.5, 0.5)
            spec = cls(16, 2, 2, 128 * 32 * 32, 32 * 32 * 768, half, half, True)
        spec = replace(
            spec,
            patch_size=int(getattr(vision, "patch_size", spec.patch_size)),
            temporal_patch_size=int(getattr(vision, "temporal_patch_size", spec.temporal_patch_size)),
            merge_size=int(getattr(vision, "spatial_merge_size", spec.merge_size)),
        )
        return spec._updated(_processor_file(folder)) if folder is not None else spec

    def _updated(self, values: Mapping[str, Any]) -> PatchSpec:
        size = values.get("size") if isinstance(values.get("size"), Mapping) else {}
        assert isinstance(size, Mapping)
        low = values.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or self.min_pixels
        high = values.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or self.max_pixels
        return replace(
            self,
            min_pixels=int(low),
            max_pixels=int(high),
            mean=tuple(float(v) for v in values.get("image_mean") or self.mean),
            std=tuple(float(v) for v in values.get("image_std") or self.std),
        )


def _processor_file(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    for name in ("video_preprocessor_config.json", "processor_config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"expected JSON in {name}, got something else") from None
        values = values.get("video_processor", values) if isinstance(values, dict) else {}
        return values if isinstance(values, dict) else {}
    return {}


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 128 * 28 * 28,
    max_pixels: int = 28 * 28 * 768,
    num_frames: int | None = None,
    temporal_patch_size: int = 2,
) -> tuple[int, int]:
    r"""The processors' target size: both sides multiples of ``factor``, pixels within bounds, aspect kept.

    Sides round to the nearest multiple; if their product leaves the bounds both are scaled by
    :math:`\sqrt{hw / max}` (rounding down) or :math:`\sqrt{min / hw}` (rounding up). With ``num_frames`` the
    product is taken over the whole video (Qwen3-VL).

    Raises:
        ValueError: for sides below 1 or an aspect ratio above 200.

    Example:
        >>> smart_resize(272, 640)
        (280, 644)
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected frames of at least 1 x 1 pixels, got {width} x {height}")
    frames, frames_bar = 1, 1
    if num_frames is not None:
        frames = num_frames
        # Python's round, as in the processor; a single frame is padded to a whole temporal patch later.
        frames_bar = max(temporal_patch_size, round(num_frames / temporal_patch_size) * temporal_patch_size)
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"expected an aspect ratio of at most 200, got {max(height, width) / min(height, width):.1f}")
    h_bar, w_bar = round(height / factor) * factor, round(width / factor) * factor
    if frames_bar * h_bar * w_bar > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif frames_bar * h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


def patchify(frames: Tensor | Iterable[Tensor], spec: PatchSpec, *, resize: bool = True) -> Patches:
    r"""Cut one video into the patches that a Qwen vision tower takes.

    Value :math:`(v - 255\,mean_c) / (255\,std_c)` of pixel :math:`v`; a patch is (channel, frame, row, column)
    flattened, patches run over (frame, block row, block column, row in block, column in block) with blocks of
    ``merge_size``². An odd last frame is repeated.

    Args:
        frames: uint8 ``[T, 3, H, W]``, or chunks of it in order (resized beforehand).
        spec: sizes and normalisation of the model.
        resize: bring frames to ``spec.size`` first; chunks must have it already.

    Raises:
        ValueError: for frames of another shape or dtype, none at all, or sides that are not multiples of a token.

    Source: the layout of ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor`` in transformers.

    Example:
        >>> out = patchify(torch.zeros(4, 3, 56, 84, dtype=torch.uint8), PatchSpec(), resize=False)
        >>> out.pixel_values_videos.shape, out.grid_thw
        (torch.Size([48, 1176]), (2, 4, 6))
    """
    if isinstance(frames, Tensor):
        _check_frames(frames)
        if resize:
            frames = resize_frames(frames, spec.size(frames.shape[0], int(frames.shape[2]), int(frames.shape[3])))
        frames = [frames]
    elif resize:
        raise ValueError("expected resize=False with frames in chunks, got resize=True")
    step, parts, held, grid_hw = spec.temporal_patch_size, [], None, (0, 0)
    for chunk in frames:
        _check_frames(chunk)
        chunk = chunk if held is None else torch.cat([held, chunk])
        whole = chunk.shape[0] // step * step
        held = chunk[whole:] if whole < chunk.shape[0] else None
        if whole:
            patches, grid_hw = _cut(chunk[:whole], spec)
            parts.append(patches)
    if held is not None:
        patches, grid_hw = _cut(torch.cat([held, held[-1:].expand(step - held.shape[0], -1, -1, -1)]), spec)
        parts.append(patches)
    if not parts:
        raise ValueError("expected at least one frame, got none")
    pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
    return Patches(pixels, (pixels.shape[0] // (grid_hw[0] * grid_hw[1]), *grid_hw))


def _check_frames(frames: Tensor) -> None:
    if not isinstance(frames, Tensor) or frames.dim() != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        got = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
        raise ValueError(f"expected uint8 frames of shape [T, 3, H, W], got {got}")


def _cut(frames: Tensor, spec: PatchSpec) -> tuple[Tensor, tuple[int, int]]:
    p, m, step = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    count, _, height, width = frames.shape
    if height % (p * m) or width % (p * m) or not height or not width:
        raise ValueError(f"expected frame sides that are multiples of {p * m}, got {width} x {height}")
    # mean and std scaled by 255 in fp32 and applied by subtraction then division: bit-equal to the processor.
    scale = 1.0 / (1 / 255)
    mean = (torch.tensor(spec.mean) * scale).view(1, -1, 1, 1)
    std = (torch.tensor(spec.std) * scale).view(1, -1, 1, 1)
    values = frames.to(torch.float32).sub_(mean).div_(std)
    gt, gh, gw = count // step, height // p, width // p
    blocks = values.view(gt, step, 3, gh // m, m, p, gw // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(gt * gh * gw, 3 * step * p * p), (gh, gw)
