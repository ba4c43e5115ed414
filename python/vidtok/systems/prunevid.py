"""PruneVid for Qwen's video-language models: a video and a question in, an answer out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from vidtok import _check
from vidtok.data import PatchSpec, load_video, patchify
from vidtok.data.prompt import build, to_device
from vidtok.methods.prunevid import check
from vidtok.models.attach import attach
from vidtok.models.drop import Drop
from vidtok.models.report import Report
from vidtok.systems.features import Qwen25VLStage1Wrapper
from vidtok.systems.stage1 import Qwen25VLStage1WrapperV2, Stage1

__all__ = ["Qwen25VLPruneVid", "Qwen25VLStage1Wrapper", "Qwen25VLStage1WrapperV2"]

VERSIONS: dict[str, type[Stage1]] = {"v1": Qwen25VLStage1Wrapper, "v2": Qwen25VLStage1WrapperV2}
_TYPES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
Clips = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Qwen25VLPruneVid:
    r"""A Qwen2.5-VL model that answers questions about videos with PruneVid's fewer tokens.

    Stage 1 merges what stands still over time and clusters in space, before the language model
    (:func:`vidtok.methods.prunevid`). Stage 2 keeps, after layer ``selected_layer``, of each group of
    stage 1 the share ``alpha`` with the highest attention of the question, maximum over heads and
    question tokens; the keys and values of the layers up to it are made shorter too.

    Args:
        model_path: folder of a Qwen2.5-VL checkpoint (Qwen2-VL and Qwen3-VL are taken too), which is read
            without a network, or a hub id.
        enable_stage1: whether stage 1 runs.
        tau: mean cosine above which a slot is static, in [−1, 1].
        cluster_ratio: share kept of each group of more than 14 tokens, in (0, 1].
        temporal_segment_ratio: temporal segments per frame, in (0, 1].
        enable_stage2: whether stage 2 runs.
        selected_layer: 0-based layer whose attention stage 2 asks.
        alpha: share that stage 2 keeps, in (0, 1].
        max_frames: frames taken of each video, evenly spread.
        verbose: print what each call did.
        stage1_version: ``"v2"`` merges at the input of the language model, ``"v1"`` in
            ``get_video_features``; both give the same logits.
        position: ``"keep"`` or ``"renumber"``, as for :func:`vidtok.attach`.
        device: ``"auto"`` is the GPU when there is one.
        dtype: a torch dtype or its name; ``"auto"`` is the checkpoint's.
        attn_implementation: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``.
        max_pixels: bound on pixels per frame below the checkpoint's own.
        reader: further arguments of :class:`vidtok.data.VideoReader`, such as ``{"isolate": True}``.

    Raises:
        ValueError: options outside their range, or a path with no such model.

    Source: PruneVid (arXiv 2412.16117), from its formulas.

    Example:
        >>> model = Qwen25VLPruneVid("checkpoints/Qwen2.5-VL-7B-Instruct", tau=0.8)  # doctest: +SKIP
        >>> model.generate(video_path="video.mp4", question="What is happening?")  # doctest: +SKIP
        'A rabbit leaves its burrow.'
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        enable_stage1: bool = True,
        tau: float = 0.8,
        cluster_ratio: float = 0.5,
        temporal_segment_ratio: float = 0.25,
        enable_stage2: bool = False,
        selected_layer: int = 10,
        alpha: float = 0.4,
        max_frames: int = 16,
        verbose: bool = False,
        *,
        stage1_version: str = "v2",
        position: str = "keep",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str = "sdpa",
        max_pixels: int | None = None,
        reader: dict[str, Any] | None = None,
    ) -> None:
        check(tau, cluster_ratio, temporal_segment_ratio)
        if stage1_version not in VERSIONS:
            _check.fail("stage1_version 'v1' or 'v2'", repr(stage1_version))
        for name, value in (("max_frames", max_frames), ("max_pixels", 1 if max_pixels is None else max_pixels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                _check.fail(f"{name} as a whole number of at least 1", repr(value))
        drop = _stage2(selected_layer, alpha) if enable_stage2 else None
        self.max_frames, self.verbose, self._reader = max_frames, verbose, dict(reader or {})
        self.stage1_version = stage1_version
        self.model, self.tokenizer, self.patches = _load(str(model_path), device, dtype, attn_implementation)
        if max_pixels is not None:
            low = min(self.patches.min_pixels, max_pixels)
            self.patches = PatchSpec(**{**vars(self.patches), "max_pixels": max_pixels, "min_pixels": low})
        self.stage1: Stage1 | None = None
        self._handle: Any = None
        if enable_stage1:
            self.stage1 = self._handle = VERSIONS[stage1_version](
                self.model, tau, cluster_ratio, temporal_segment_ratio, verbose, decoder=drop, position=position
            )
        elif drop is not None:
            self._handle = attach(self.model, decoder=drop, position=position)

    # ------------------------------------------------------------------ answers
    def prepare(self, video_path: Clips, question: str) -> dict[str, Any]:
        """Inputs of ``model.generate`` for one question about one video or several.

        Args:
            video_path: a local video file, or a sequence of them in the order in which they are shown.
            question: plain text.

        Raises:
            ValueError: for a file that cannot be read, no video, or an empty question.
        """
        if not isinstance(video_path, str | os.PathLike | Sequence):
            _check.fail("a video_path, or a sequence of them", type(video_path).__name__)
        if not isinstance(question, str):
            _check.fail("a question as text", type(question).__name__)
        paths = [video_path] if isinstance(video_path, str | os.PathLike) else list(video_path)
        if not paths:
            raise ValueError("expected a video_path, got none")
        if not question.strip():
            raise ValueError("expected a question, got an empty one")
        clips = []
        for path in paths:
            video = load_video(path, rule="linspace", count=self.max_frames, size=self.patches.size, **self._reader)
            clips.append((video, patchify(video.frames, self.patches, resize=False)))
        inputs = build(self.model, self.tokenizer, clips, self.patches, question)
        return to_device(inputs, self.model.device, self.model.dtype)

    def generate(self, video_path: Clips, question: str, max_new_tokens: int = 128, **options: Any) -> str:
        """The answer to a question about one video or several.

        Args:
            video_path: a local video file, or a sequence of them.
            question: plain text.
            max_new_tokens: most tokens of the answer.
            options: further arguments of ``model.generate``; without ``do_sample`` the answer is greedy.

        Raises:
            ValueError: for bad input, as :meth:`prepare`; the next call is not affected.
        """
        inputs = self.prepare(video_path, question)
        options = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
        if self.stage1 is None or not self.stage1.active:
            output = self.model.generate(**inputs, **options)
        else:
            with self.stage1.video_info(inputs["video_grid_thw"], inputs["pixel_values_videos"]):
                output = self.model.generate(**inputs, **options)
        ids = getattr(output, "sequences", output)
        if self.verbose and self._handle is not None:
            print(self.report(), flush=True)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()

    # ------------------------------------------------------------------ the attachment
    def report(self) -> Report:
        """What the last prefill did: tokens of each video before and after, seconds per stage."""
        return Report() if self._handle is None else self._handle.report()

    def restore(self) -> None:
        """Take both stages out; ``generate`` answers as the unreduced model from now on."""
        if self._handle is not None:
            self._handle.restore()

    def __enter__(self) -> Qwen25VLPruneVid:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()


def _stage2(selected_layer: int, alpha: float) -> Drop:
    """Stage 2 as a drop after ``selected_layer``."""
    if isinstance(selected_layer, bool) or not isinstance(selected_layer, int) or selected_layer < 0:
        _check.fail("selected_layer as a 0-based layer", repr(selected_layer))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
        _check.fail("alpha in (0, 1]", repr(alpha))
    return Drop(f"attn_{selected_layer}_{format(Decimal(repr(alpha)), 'f')}", preset="prunevid")


def _load(
    name: str, device: str | torch.device, dtype: str | torch.dtype, attention: str
) -> tuple[Any, Any, PatchSpec]:
    """Model, tokenizer and patch rules; code inside a checkpoint is never run."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    local = Path(name).is_dir()
    if not local and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"expected model_path to be a checkpoint folder or a hub id, got {name!r}")
    if local and not (Path(name) / "config.json").is_file():
        raise ValueError(f"expected model_path to be a folder with a model's config.json, got {name!r} without one")
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        what = "a folder with a model's config" if local else "a checkpoint folder, or a hub id that can be loaded"
        raise ValueError(f"expected model_path to be {what}, got {name!r}") from error
    if getattr(config, "model_type", None) not in _TYPES:
        _check.fail(f"a model among {', '.join(_TYPES)}", repr(getattr(config, "model_type", None)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    spec = PatchSpec.for_model(config, name if local else _folder(name))
    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation=attention, **where)
    return model.to(device).eval(), tokenizer, spec


def _folder(name: str) -> str | None:
    """Folder of the hub's cache with the processor settings of ``name``."""
    from transformers.utils import cached_file

    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return str(Path(found).parent)
    return None
