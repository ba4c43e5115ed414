"""Options of token merging across frames, and the counts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from vidtok import _check
from vidtok.merge.options import FORMS, METRICS
from vidtok.merge.schedule import Schedule, _is_int
from vidtok.ops.bipartite import prefix_merge_count

OUTPUTS = ("auto", "frames", "video", "full")

#: Clips of each video: one number for all, or one for each.
Clips = int | tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """What one block does: ``clips`` of ``tokens`` come in, ``join`` of them become one, ``cross`` and ``intra`` merge.

    ``prefix`` and ``joined`` are protected tokens and all tokens of a sequence after the join, ``frames`` its frames.
    """

    clips: Clips
    tokens: int
    join: int
    frames: int
    prefix: int
    joined: int
    cross: int
    intra: int

    @property
    def clips_out(self) -> Clips:
        """Sequences of each video from this block on."""
        return joined_clips(self.clips, self.join)

    @property
    def attended(self) -> int:
        """Tokens of a sequence in this block's attention."""
        return self.joined - self.cross

    @property
    def tokens_out(self) -> int:
        """Tokens of a sequence in this block's MLP."""
        return self.attended - self.intra


def joined_clips(clips: Clips, join: int) -> Clips:
    """Clips of each video when ``join`` of them become one, the last of those that are left."""
    return -(-clips // join) if isinstance(clips, int) else tuple(-(-c // join) for c in clips)


@dataclass(frozen=True)
class TempMe:
    r"""Token merging inside frames, then across the frames of a video, clip by clip, until the video is one clip.

    Blocks before the first of ``merge_layers`` merge ``r`` pairs in every frame, as ToMe does. Before the
    attention of block ``merge_layers[i]`` every ``merge_frames[i]`` neighbouring clips of n tokens become one of
    :math:`N = M n` (class tokens of all frames first), whose :math:`\lfloor cross \cdot N \rfloor` most similar
    pairs of tokens (by the tokens themselves) become one each; after its attention
    :math:`\lfloor intra \cdot N' \rfloor` of the N' that are left merge (by ``metric``), and so they do in the
    blocks between and behind. Merges are clamped to half of the unprotected tokens.

    A tower is given the frames of its videos as its batch, ``[videos * frames, ...]``. Where the clips of a video
    are no multiple of M, its last clip is smaller: it is filled up with copies that weigh nothing (2⁻¹²⁰ of a
    token in attention and in means, whatever ``prop_attn`` says) and that nothing reads. Clips that are fewer than
    M join as one; a video that is one clip already does not join, so its blocks merge ``intra`` only.

    Args:
        frames: of every video; :meth:`vidtok.merge.FrameMerging.frames` says otherwise for some calls.
        r: merges of each block before the first join: a number, a list or ``(r, inflection)``.
        merge_layers: blocks before whose attention clips join, ascending from 0.
        merge_frames: how many clips become one there.
        cross: share of a joined clip's tokens that merge before attention.
        intra: share of the tokens that merge after it.
        frame_pos: whether a trainable vector for each clip (zeros at first) is added to its tokens when clips join,
            between matching and merging; they are ``handle.vision[0].positions``.
        output: what leaves the tower. ``frames``: ``[videos * frames, p, C]``, the class and register tokens of
            each frame, so that what reads the class token gets one row for each frame. ``video``:
            ``[clips, tokens, C]`` as the last block left them. ``full``: ``[videos * frames, n, C]``, each token of
            each frame, merged ones as copies. ``auto``: ``frames`` where the tower has such tokens, else ``video``.
        metric: of merging inside clips: ``keys``, ``values`` or ``hidden``.
        prop_attn: whether attention weighs a token by how many it stands for.
        protected: further tokens at the start of every frame that never merge.
        trace: whether the plans are kept, for ``trace()`` and ``unmerge()``.
        form: how the log of the sizes enters attention: ``mask``, ``channel`` or ``auto``.

    Raises:
        ValueError: for options outside their range.

    Source: Shen et al., TempMe, ICLR 2025, §3. The defaults are those of ViT-B/32 (600 tokens become 97);
    ``r=10, cross=0.4, intra=0.2`` are those of ViT-B/16 (2364 become 127).

    Example:
        >>> [level.tokens_out for level in TempMe().levels(12, 12, 50, 1)]
        [48, 46, 44, 42, 40, 38, 36, 34, 44, 56, 107, 97]
    """

    frames: int = 12
    r: Any = 2
    merge_layers: tuple[int, ...] = (8, 9, 10)
    merge_frames: tuple[int, ...] = (2, 2, 3)
    cross: float = 0.3
    intra: float = 0.1
    frame_pos: bool = False
    output: str = "auto"
    metric: str = "keys"
    prop_attn: bool = True
    protected: int = 0
    trace: bool = False
    form: str = "auto"

    def __post_init__(self) -> None:
        for name in ("merge_layers", "merge_frames"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not value or not all(map(_is_int, value)):
                _check.fail(f"{name} as a list of integers", repr(value))
            object.__setattr__(self, name, tuple(value))
        layers, joins = self.merge_layers, self.merge_frames
        if layers[0] < 0 or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
            _check.fail("merge_layers ascending from at least 0", repr(list(layers)))
        if len(layers) != len(joins) or min(joins) < 1:
            _check.fail(f"merge_frames with {len(layers)} numbers of at least 1, as merge_layers", repr(list(joins)))
        if not _is_int(self.frames) or self.frames < 1:
            _check.fail("frames as an integer of at least 1", repr(self.frames))
        for name in ("cross", "intra"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                _check.fail(f"{name} from 0 to 1", repr(share))
        for name, words in (("metric", METRICS), ("form", FORMS), ("output", OUTPUTS)):
            if getattr(self, name) not in words:
                _check.fail(f"{name} as one of {', '.join(words)}", repr(getattr(self, name)))
        for name in ("frame_pos", "prop_attn", "trace"):
            if not isinstance(getattr(self, name), bool):
                _check.fail(f"{name} as True or False", repr(getattr(self, name)))
        if not _is_int(self.protected) or self.protected < 0:
            _check.fail("protected as an integer of at least 0 (a mask is for tome alone)", self.protected)
        _ = self.schedule

    @cached_property
    def schedule(self) -> FrameSchedule:
        """Merges of the blocks before the first join."""
        return FrameSchedule(Schedule(self.r), self.merge_layers)

    def levels(self, layers: int, frames: Clips, tokens: int, prefix: int) -> tuple[Level, ...]:
        """What each of ``layers`` blocks does to videos of ``frames`` of ``tokens``, ``prefix`` of them protected."""
        return _levels(self.schedule, self.merge_frames, self.cross, self.intra, layers, frames, tokens, prefix)

    def __str__(self) -> str:
        from vidtok.spec import _text

        changed = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                changed.append(f"{f.name}={_text(list(value) if f.name.startswith('merge_') else value)}")
        return "tempme" + (":" + ",".join(changed) if changed else "")


@dataclass(frozen=True)
class FrameSchedule:
    """Merges of the blocks before the first of ``joins``."""

    schedule: Schedule
    joins: tuple[int, ...]

    def wanted(self, layers: int, tokens: int) -> tuple[int, ...]:
        """As :meth:`Schedule.wanted`, for the blocks before the first join."""
        if self.joins[-1] >= layers:
            _check.fail(f"merge_layers below the {layers} layers of the tower", repr(list(self.joins)))
        return self.schedule.wanted(self.joins[0], tokens)


def _levels(
    schedule: FrameSchedule, joins: tuple[int, ...], cross: float, intra: float, layers: int, frames: Clips,
    tokens: int, prefix: int,
) -> tuple[Level, ...]:  # fmt: skip
    early = schedule.wanted(layers, tokens)
    clips, per_clip, out = frames, 1, []
    for layer in range(layers):
        most = clips if isinstance(clips, int) else max(clips, default=1)
        join = 1
        if layer in schedule.joins:
            join = min(joins[schedule.joins.index(layer)], most)
        per_clip, prefix, joined, r0 = per_clip * join, prefix * join, tokens * join, 0
        if join > 1:
            r0 = prefix_merge_count(joined, int(cross * joined), prefix)
        wanted = early[layer] if layer < len(early) else int(intra * (joined - r0))
        level = Level(
            clips, tokens, join, per_clip, prefix, joined, r0, prefix_merge_count(joined - r0, wanted, prefix)
        )
        out.append(level)
        clips, tokens = level.clips_out, level.tokens_out
    return tuple(out)
