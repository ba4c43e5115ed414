"""Which frames of a clip a retrieval model sees, and how they are made: short side, centre crop, CLIP's scale."""

from __future__ import annotations

import importlib.util
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidtok._check import fail
from vidtok.data import sampling
from vidtok.data._decode import shown
from vidtok.data.retrieval.cache import FrameCache
from vidtok.data.retrieval.pairs import Clip
from vidtok.data.video import Limits, VideoError, VideoReader

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
POSITIONS = ("head", "tail", "uniform")
ORDERS = ("ordinary", "reverse", "random")


def pick(count: int, wanted: int, position: str = "uniform", rng: random.Random | None = None) -> list[int]:
    r"""Numbers, ascending, of at most ``wanted`` out of ``count`` frames.

    ``uniform`` takes the middle of each of ``wanted`` equal segments, and with ``rng`` a random frame of each:
    from :math:`\lfloor kn/w \rfloor` to :math:`\lfloor (k+1)n/w \rfloor - 1`. ``head`` and ``tail`` take the first
    and the last frames. Of fewer frames than wanted, each is taken once.

    Raises:
        ValueError: for an unknown position or a count below 1.

    Example:
        >>> pick(10, 2), pick(10, 3, "tail"), pick(2, 12)
        ([2, 7], [7, 8, 9], [0, 1])
    """
    if position not in POSITIONS:
        fail(f"a position among {', '.join(POSITIONS)}", repr(position))
    if wanted < 1 or count < 1:
        fail("at least 1 frame to take and to take from", f"{wanted} and {count}")
    if count <= wanted:
        return list(range(count))
    if position == "head":
        return list(range(wanted))
    if position == "tail":
        return list(range(count - wanted, count))
    if rng is None:
        return sampling.segment_centre(count, wanted)
    edges = [k * count // wanted for k in range(wanted + 1)]
    return [rng.randrange(a, b) for a, b in zip(edges, edges[1:])]


def crop_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """(resized height, resized width, top, left) that bring the short side to ``size`` and cut out the centre.

    Raises:
        VideoError: for a picture more than 32 times as long as wide.
    """
    short, long = min(height, width), max(height, width)
    if long > 32 * short:
        raise VideoError(f"expected frames at most 32 times as long as wide, got {width} x {height}")
    other = int(size * long / short)
    h, w = (size, other) if height <= width else (other, size)
    return h, w, round((h - size) / 2), round((w - size) / 2)


def normalize(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``[..., 3, H, W]`` to CLIP's scale: divided by 255, less the mean, by the deviation of each channel."""
    mean = torch.tensor(MEAN, device=frames.device).view(3, 1, 1)
    std = torch.tensor(STD, device=frames.device).view(3, 1, 1)
    return ((frames.float() / 255 - mean) / std).to(dtype)


@dataclass(frozen=True)
class FrameRule:
    """How frames become a model's input.

    Args:
        count: frames per clip at most.
        size: height and width in pixels.
        position: ``uniform``, ``head`` or ``tail``, see :func:`pick`.
        order: ``ordinary``, ``reverse`` or ``random``.
        shift: a random frame of each segment instead of its middle one (training).
        rate: candidates per second; every frame of the video is one by default.
    """

    count: int = 12
    size: int = 224
    position: str = "uniform"
    order: str = "ordinary"
    shift: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("count", 65536), ("size", 8192)):
            if not 1 <= getattr(self, name) <= most:
                fail(f"{name} of at least 1 and at most {most}", f"{getattr(self, name)}")
        for name, known in (("position", POSITIONS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                fail(f"{name} among {', '.join(known)}", repr(getattr(self, name)))
        if self.rate is not None and not 0 < self.rate < math.inf:
            fail("a positive rate in frames per second", f"{self.rate}")

    def evaluating(self) -> FrameRule:
        """The same without anything random."""
        return replace(self, shift=False, order="ordinary" if self.order == "random" else self.order)


@dataclass
class FrameLoader:
    """Clips to frames through the decoders of :mod:`vidtok.data.video` and a cache.

    Args:
        rule: which frames, and their size.
        cache: where decoded frames are kept; nowhere by default.
        backend: ``auto``, ``decord`` or ``pyav``.
        isolate: decode in a process of its own (:class:`vidtok.data.VideoReader`).
        limits: what one video may cost.
    """

    rule: FrameRule = field(default_factory=FrameRule)
    cache: FrameCache | None = None
    backend: str = "auto"
    isolate: bool = False
    limits: Limits = field(default_factory=Limits)

    def load(self, clip: Clip, seed: object = None) -> tuple[Tensor, Tensor]:
        """Frames uint8 ``[count, 3, S, S]``, and int64 ``[count]`` that is 1 for frames and 0 for filling.

        A clip with fewer frames is filled up with copies of its last one. ``seed`` decides what is random.

        Raises:
            VideoError: in one sentence, when the file cannot be read.
        """
        rule, key = self.rule, ""
        made: dict[int, Tensor] = {}
        rng = random.Random(repr(seed)) if rule.shift or rule.order == "random" else None
        if self.cache is not None:
            try:
                made_by = ("short bicubic centre", _decoder(self.backend))
                key = self.cache.key(clip.path, clip.span, rule.size, rule.rate, *made_by)
            except OSError as error:
                raise VideoError(f"expected a video file, got {shown(str(clip.path))}: {error.strerror}") from None
            facts = self.cache.facts(key)
            if facts is not None and _sound(facts):
                numbers = self._numbers(facts["candidates"], rng)
                _, kept = self.cache.get(key, numbers, rule.size)
                made = {n: torch.from_numpy(f.copy()) for n, f in kept.items()}
                if len(made) == len(set(numbers)):
                    return self._stack([made[n] for n in numbers])
                rng = random.Random(repr(seed)) if rng is not None else None
        with VideoReader(
            clip.path, backend=self.backend, num_threads=1, isolate=self.isolate, limits=self.limits
        ) as video:
            candidates = _candidates(video, clip.span, rule.rate)
            numbers = self._numbers(candidates, rng)
            height, width, top, left = crop_box(video.height, video.width, rule.size)
            fresh: dict[int, Tensor] = {}
            for part in video.read(sorted(set(numbers) - set(made)), chunk=8, size=(height, width)):
                cut = part.frames[:, :, top : top + rule.size, left : left + rule.size]
                fresh.update(zip(part.numbers, cut))
        if self.cache is not None:
            self.cache.add(key, {"candidates": candidates}, {n: f.numpy() for n, f in fresh.items()})
        made.update(fresh)
        return self._stack([made[n] for n in numbers])

    def _numbers(self, candidates: Sequence[Any], rng: random.Random | None) -> list[int]:
        first, last, *rest = candidates
        count = len(rest[0]) if rest else last - first
        chosen = pick(count, self.rule.count, self.rule.position, rng if self.rule.shift else None)
        numbers = [int(rest[0][i]) if rest else first + i for i in chosen]
        if self.rule.order == "reverse":
            numbers.reverse()
        elif self.rule.order == "random" and rng is not None:
            rng.shuffle(numbers)
        return numbers

    def _stack(self, frames: list[Tensor]) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(self.rule.count, dtype=torch.int64)
        mask[: len(frames)] = 1
        return torch.stack(frames + frames[-1:] * (self.rule.count - len(frames))), mask


def _candidates(video: VideoReader, span: tuple[float, float] | None, rate: float | None) -> list[Any]:
    """[first, one past the last] frame of the span, and with a rate also the numbers in between."""
    first, last = 0, video.num_frames
    if span is not None:
        times = video.timestamps - video.timestamps[0]
        # A span behind the end of the file leaves its last frame.
        first = min(bisect_left(times, span[0] - 1e-6), video.num_frames - 1)
        last = max(first + 1, bisect_right(times, span[1] + 1e-6))
    if rate is None:
        return [first, last]
    stamps = np.asarray(video.timestamps[first:last])
    return [first, last, [first + i for i in sampling.fps(stamps, rate)]]  # type: ignore[arg-type]


def _decoder(backend: str) -> str:
    """What decides who decodes, as decoders differ in a few values; known without opening a file."""
    if backend != "auto":
        return backend
    # PyAV serves only files on which decord fails, which it does again.
    return "decord, else pyav" if importlib.util.find_spec("decord") is not None else "pyav"


def _sound(facts: dict[str, Any]) -> bool:
    """Whether candidates read from a file are what :func:`_candidates` writes."""
    found = facts.get("candidates")
    if not isinstance(found, list) or len(found) not in (2, 3) or not all(isinstance(v, int) for v in found[:2]):
        return False
    rest = found[2] if len(found) == 3 else [0]
    return found[0] < found[1] and isinstance(rest, list) and bool(rest) and all(isinstance(v, int) for v in rest)


def describe(rule: FrameRule) -> dict[str, Any]:
    """The rule as plain values, for logs and checkpoints."""
    return asdict(rule)
