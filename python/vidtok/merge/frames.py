"""Token merging across the frames of a video: clips that join along the depth of a tower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.attach import Merging
from vidtok.merge.block import Halves
from vidtok.merge.clips import FrameRun
from vidtok.merge.run import Run
from vidtok.merge.schedule import _is_int
from vidtok.merge.tempme import Clips, TempMe


class FramePositions(nn.Module):
    """A trainable vector for each clip of a video at each join, ``levels[i]`` ``[clips, C]``, zeros at first.

    It is no part of the tower and not in its ``state_dict``: save its own, and give its parameters to the optimizer.
    """

    def __init__(self, clips: Sequence[int], width: int, like: Tensor) -> None:
        super().__init__()
        self.levels = nn.ParameterList([nn.Parameter(like.new_zeros(count, width)) for count in clips])


class FrameMerging(Merging):
    """Token merging across the frames of videos, which a tower gets as its batch; see :class:`TempMe`."""

    options: Any

    def __init__(
        self,
        tower: nn.Module,
        blocks: Sequence[nn.Module],
        halves: Halves,
        options: TempMe,
        prefix: int = 0,
        full_length: bool = False,
    ) -> None:
        output = "full" if full_length else options.output
        if output == "auto":
            output = "frames" if prefix else "video"
        if output == "frames" and not prefix:
            _check.fail(f"output=video or output=full for {type(tower).__name__}, which has no class token", "frames")
        #: The trainable vectors of ``frame_pos=true``, which are no parameters of the tower.
        self.positions: FramePositions | None = None
        if options.frame_pos:
            # The number of clips does not depend on tokens: one for each frame is enough to count with.
            levels = options.levels(len(blocks), options.frames, 1, 0)
            counts = [cast(int, levels[layer].clips) for layer in options.merge_layers]
            self.positions = FramePositions(counts, _width(tower, blocks[0]), next(tower.parameters()))
        super().__init__(tower, blocks, halves, cast(Any, options), prefix, output == "full")
        self._output = output
        self._frames: Clips = options.frames

    @property
    def output(self) -> str:
        """What leaves the tower: ``frames``, ``video`` or ``full``; see :class:`TempMe`."""
        return "full" if self.full_length else self._output

    @contextmanager
    def frames(self, frames: int | Sequence[int]) -> Iterator[FrameMerging]:
        """Say how many frames the videos of the calls inside a ``with`` block have: all of them, or each.

        Raises:
            ValueError: for a number below 1.

        Example:
            >>> with handle.vision[0].frames([12, 5]):  # doctest: +SKIP
            ...     model.get_image_features(pixel_values)  # [17, 3, 224, 224]
        """
        each = (frames,) if isinstance(frames, int) else tuple(frames)
        if not each or not all(_is_int(count) and count >= 1 for count in each):
            _check.fail("frames of at least 1 for every video", repr(frames))
        before, self._frames = self._frames, frames if isinstance(frames, int) else each
        try:
            yield self
        finally:
            self._frames = before

    def begin(self, x: Tensor, real: Tensor | None = None) -> Run:
        """The run of a pass whose first block gets ``x`` ``[videos * frames, T, C]``."""
        if x.dim() != 3:
            _check.fail("tokens [videos * frames, T, C] in the first block", x)
        rows, tokens = _fixed(x.shape[0]), _fixed(x.shape[1])
        frames = self._frames
        if (rows % frames if isinstance(frames, int) else rows - sum(frames)) != 0:
            whole = f"whole videos of {frames} frames" if isinstance(frames, int) else f"{sum(frames)} frames"
            _check.fail(f"a batch of {whole} (merging.frames() names others)", f"{rows} rows")
        options = self.options
        keep = options.trace or self.full_length
        levels = options.levels(self.layers, frames, tokens, min(self.prefix + options.protected, tokens))
        run = FrameRun(options, levels, frames, keep)
        run.tokens[0] = tokens
        return run

    def forward(self, block: nn.Module, run: Run, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert isinstance(run, FrameRun)
        for name, value in [*((f"argument {i}", v) for i, v in enumerate(args[1:], 1)), *kwargs.items()]:
            if any(isinstance(part, Tensor) and part.dim() for part in (value if _is_several(value) else (value,))):
                raise ValueError(
                    f"expected blocks of {type(self.tower).__name__} that get their tokens only for merging across "
                    f"frames, got {name} too, which does not join ('tome' merges in each frame)"
                )
        x = run.step(index).join(args[0], self._positions(run, index))
        return super().forward(block, run, index, (x, *args[1:]), kwargs)

    def _positions(self, run: FrameRun, index: int) -> Tensor | None:
        if self.positions is None or index not in self.options.merge_layers:
            return None
        own = self.positions.levels[self.options.merge_layers.index(index)]
        clips = run.levels[index].clips
        most = clips if isinstance(clips, int) else max(clips)
        if most > own.shape[0]:
            _check.fail(f"at most {own.shape[0]} clips before block {index}, as frame positions have", str(most))
        return own

    def leave(self, run: Run, x: Tensor) -> Tensor:
        """What the tower gives of the last block's ``[clips, T', C]``."""
        assert isinstance(run, FrameRun)
        if self.full_length:
            return run.full(self.layers, x)
        if self._output == "video":
            return x
        level = run.levels[-1]
        each, clips, frames = level.prefix // level.frames, level.clips_out, run.frames
        x = x[:, : level.prefix].reshape(-1, each, x.shape[-1])
        if isinstance(clips, int) and isinstance(frames, int):
            places = clips * level.frames
            return x if places == frames else x.view(-1, places, *x.shape[1:])[:, :frames].flatten(0, 1)
        assert not isinstance(clips, int) and not isinstance(frames, int)
        starts = accumulate((count * level.frames for count in clips), initial=0)
        rows = [start + i for start, count in zip(starts, frames, strict=False) for i in range(count)]
        return x.index_select(0, torch.tensor(rows, device=x.device))

    def unmerge(self, y: Tensor) -> Tensor:
        """``[clips, T', C]`` of the last pass at the tokens of every frame, ``[videos * frames, T, C]``."""
        self.trace()
        if self.run is None:
            raise ValueError("expected a forward pass before unmerge, got none")
        return self.run.full(self.layers, y)


def _is_several(value: object) -> bool:
    return isinstance(value, list | tuple)


def _fixed(count: int) -> int:
    """``count``; compiled code is made anew for each, because how videos divide a batch is hard to show of a symbol."""
    return len(range(count))


def _width(tower: Any, block: nn.Module) -> int:
    """Channels of a block's tokens."""
    for owner, name in ((getattr(tower, "config", None), "hidden_size"), (tower, "embed_dim"), (tower, "num_features")):
        width = getattr(owner, name, None)
        if isinstance(width, int):
            return width
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, Tensor):
            return weight.shape[-1]
    raise ValueError(
        f"expected {type(tower).__name__} to have config.hidden_size, embed_dim or a norm in its blocks, got none"
    )


def kind_of(kind: type[Merging], options: Any, tower: nn.Module) -> type[Merging]:
    """The class that merges in ``tower``: ``kind``, or one for frames where the options want it."""
    if not isinstance(options, TempMe):
        return kind
    if kind is not Merging:
        raise ValueError(
            f"expected a tower whose batch is frames for 'tempme', got {type(tower).__name__}, whose sequences lie "
            "behind one another ('tome' merges in it)"
        )
    return FrameMerging
