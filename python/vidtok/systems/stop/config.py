"""Sizes of the backbone and settings of the retrieval model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from vidtok import _check

SIM_HEADERS = ("meanP",)
TEMPORAL_PROMPTS = ("none", "DGL", "group2-2")

#: Settings of the published guide: merges per layer and frames per video.
PRESETS: dict[str, dict[str, Any]] = {
    "training": {"tome_r": 2, "max_frames": 12},
    "inference": {"tome_r": 4, "max_frames": 12},
    "prototyping": {"tome_r": 8, "max_frames": 8},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a CLIP backbone; the defaults are those of ViT-B/32.

    Args:
        image: side of the square image in pixels.
        patch: side of a patch in pixels; it divides ``image``.
        vision_width, vision_layers, vision_heads: of the vision tower.
        context: positions of the text tower.
        vocabulary: token ids.
        text_width, text_layers, text_heads: of the text tower.
        embed: channels of the space that both towers project to.
    """

    image: int = 224
    patch: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    context: int = 77
    vocabulary: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    embed: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                _check.fail(f"{field.name} as an integer of at least 1", repr(value))
        for small, large in (("patch", "image"), ("vision_heads", "vision_width"), ("text_heads", "text_width")):
            if getattr(self, large) % getattr(self, small):
                _check.fail(f"{small} that divides {large}={getattr(self, large)}", f"{small}={getattr(self, small)}")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image // self.patch


@dataclass
class Config:
    r"""Settings of :class:`vidtok.systems.stop.CLIP4Clip`, by the names of its command line.

    Args:
        temporal_prompt: ``none`` (plain CLIP4Clip), ``DGL`` (global and per-frame prompts) or ``group2-2``
            (STOP: also prompts on pixels and between frames).
        sim_header: ``meanP``, the mean over frames.
        loose_type: separate towers; ``meanP`` has no other form.
        max_frames, max_words: of a video and of a caption.
        freeze_layer_num: -1 trains everything; n ≥ 0 freezes the embeddings and the first n layers of both
            towers; with prompts, n of at least the layer count freezes all of CLIP.
        global_prompts, frame_prompts: prompts of a video and of each frame.
        lora: whether every block has an adapter.
        adapter_width: its hidden channels.
        adapter_scale: its factor.
        prompt_dropout: dropout inside the modules that make prompts.
        prompt_scale: factor of the prompts on pixels and between frames.
        regions: ``group2-2``: cells of the grid that the pixel prompt adds to once more.
        frame_weights: ``video`` scales the weights of frames to [0, 1] in each video; ``batch`` does so over the
            whole batch as published, which lets the embedding of a video depend on the others.
        gradient_checkpointing: whether the layers of the vision tower are computed again in the backward pass.
        vision_heads, text_heads: of a backbone whose heads do not have 64 channels.
        tome_r: merges per layer, as ``r`` of :class:`vidtok.merge.ToMe`; 0 merges nothing.
        tome_trace_source: whether the plans are kept, for ``source_map()``.
        tome_prop_attn: whether keys weigh by how many tokens they stand for.
        tome_metric: what similarity is taken of.
        tome_frame_merging: whether frames join along the depth, as :class:`vidtok.merge.TempMe` says.
        tome_merge_layers: 0-based layers before whose attention they do, ``"8-9-10"``.
        tome_merge_frame_nums: how many clips become one there, ``"2-2-3"``.
        tome_merge_proportions: percent of a joined clip's tokens that merge before attention, and after it in
            this layer and the next ones, ``"30-10"``.

    Raises:
        ValueError: for a value outside its range, naming the known ones.
    """

    temporal_prompt: str = "none"
    sim_header: str = "meanP"
    loose_type: bool = True
    max_frames: int = 12
    max_words: int = 32
    freeze_layer_num: int = -1
    global_prompts: int = 4
    frame_prompts: int = 4
    lora: bool = True
    adapter_width: int = 32
    adapter_scale: float = 0.1
    prompt_dropout: float = 0.5
    prompt_scale: float = 0.05
    regions: int = 6
    frame_weights: str = "video"
    gradient_checkpointing: bool = False
    vision_heads: int | None = None
    text_heads: int | None = None
    tome_r: Any = 0
    tome_trace_source: bool = False
    tome_prop_attn: bool = True
    tome_metric: str = "keys"
    tome_frame_merging: bool = False
    tome_merge_layers: str = "8-9-10"
    tome_merge_frame_nums: str = "2-2-3"
    tome_merge_proportions: str = "30-10"

    def __post_init__(self) -> None:
        if self.temporal_prompt is None:
            self.temporal_prompt = "none"
        for name, known in (
            ("sim_header", SIM_HEADERS),
            ("temporal_prompt", TEMPORAL_PROMPTS),
            ("frame_weights", ("video", "batch")),
        ):
            if getattr(self, name) not in known:
                _check.fail(f"{name} as one of {', '.join(known)}", repr(getattr(self, name)))
        if not self.loose_type:
            _check.fail("loose_type=True, without which meanP has no published form", repr(self.loose_type))
        for name in ("max_frames", "max_words", "global_prompts", "frame_prompts", "adapter_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                _check.fail(f"{name} as an integer of at least 1", repr(value))
        if not isinstance(self.freeze_layer_num, int) or self.freeze_layer_num < -1:
            _check.fail("freeze_layer_num of at least -1", repr(self.freeze_layer_num))

    @classmethod
    def of(cls, task: Any = None, **changes: Any) -> Config:
        """The settings that a namespace or mapping has, with ``changes``; its further entries are ignored."""
        given = {} if task is None else task if isinstance(task, Mapping) else vars(task)
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(changes) - names)
        if unknown:
            _check.fail(f"settings among {', '.join(sorted(names))}", ", ".join(unknown))
        return cls(**{k: v for k, v in given.items() if k in names} | changes)

    def namespace(self) -> SimpleNamespace:
        """The settings as a ``task_config``."""
        return SimpleNamespace(**vars(self))
