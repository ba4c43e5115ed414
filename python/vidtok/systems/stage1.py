"""PruneVid's first stage as a wrapper that is told which videos to reduce: the interface of both versions."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.methods.prunevid import check, prunevid
from vidtok.models import families
from vidtok.models.attach import attach
from vidtok.models.report import Report
from vidtok.plan import Plan

__all__ = ["Qwen25VLStage1WrapperV2", "Stage1"]


def _inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copied or pickled model."""


def _make_inert() -> Any:
    return _inert


def own(module: nn.Module, name: str) -> Any:
    """The method ``name`` as the class of ``module`` has it."""
    return types.MethodType(getattr(type(module), name), module)


class StandIn:
    """Stands in for a method of one module, until removed; copies and pickles of the module get their class's own."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.before = module.__dict__.get(name)
        wrapped: Any = self
        functools.update_wrapper(wrapped, own(module, name))
        setattr(module, name, self)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What would be called without this."""
        return (own(self.module, self.name) if self.before is None else self.before)(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there; a second call does nothing."""
        if self.module.__dict__.get(self.name) is not self:
            return
        del self.module.__dict__[self.name]
        if self.before is not None:
            setattr(self.module, self.name, self.before)

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo.get(id(self.module))
        return self if copied is None else own(copied, self.name)

    def __reduce__(self) -> Any:
        return own, (self.module, self.name)


class _Guarded(StandIn):
    """``generate`` that clears the info when it fails, also where no forward pass is under way."""

    def __init__(self, module: nn.Module, wrapper: Stage1) -> None:
        super().__init__(module, "generate")
        self.wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.original(*args, **kwargs)
        except BaseException:
            self.wrapper.clear_video_info()
            raise


class _Forget:
    """A forward hook that clears the info of a call that failed; copies of the model get an inert one."""

    def __init__(self, wrapper: Stage1) -> None:
        self.wrapper = wrapper

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if output is None:
            self.wrapper.clear_video_info()

    def __deepcopy__(self, memo: Any) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


class Gated:
    """The method of a wrapper: PruneVid's first stage for the videos it was told of, nothing otherwise."""

    images = False

    def __init__(self, options: dict[str, Any], merge: int, verbose: bool, name: str) -> None:
        self.options, self.merge, self.verbose, self.name = options, merge, verbose, name
        self.grids: list[tuple[int, int, int]] | None = None
        self.__name__ = str(self)

    @property
    def expected(self) -> Counter[tuple[int, int, int]] | None:
        """Token grids of the videos that it was told of."""
        if self.grids is None:
            return None
        return Counter((t, h // self.merge, w // self.merge) for t, h, w in self.grids)

    def __call__(self, features: Tensor, grid_thw: Tensor) -> Plan:
        videos = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
        if self.expected is None:
            return Plan.identity([t * h * w for t, h, w in videos], features.device)
        try:
            self._check(Counter(videos))
        except ValueError:
            self.grids = None
            raise
        plan = prunevid(features, videos, **self.options)
        if self.verbose:
            self._say(videos, plan)
        return plan

    def _check(self, got: Counter[tuple[int, int, int]]) -> None:
        """The call's videos must be those announced, whole sets of them where ``generate`` expands its rows."""
        expected = self.expected
        assert expected is not None
        times = got.total() // max(1, expected.total())
        if got != Counter({grid: times * n for grid, n in expected.items()}):
            told = [list(g) for g in self.grids or ()]
            seen = [[t, h * self.merge, w * self.merge] for t, h, w in got.elements()]
            raise ValueError(
                f"expected a call with the videos of set_video_info, of grids {told}, got {seen}; "
                "set_video_info before each call with other videos"
            )

    def _say(self, videos: list[tuple[int, int, int]], plan: Plan) -> None:
        cu = plan.cu_seqlens_out.tolist()
        for (t, h, w), a, b in zip(videos, cu, cu[1:]):
            print(f"{self.name}: video of {t}x{h}x{w}, {t * h * w} -> {b - a} visual tokens", flush=True)

    def __str__(self) -> str:
        return "prunevid:" + ",".join(f"{k}={v:g}" for k, v in self.options.items())


class Stage1:
    """What both versions share: when a call is reduced, and how the wrapper is taken out.

    A call is reduced between ``set_video_info`` and ``clear_video_info``, and only when it brings the videos
    of which the wrapper was told; one with other videos is refused. Outside of the two the model answers as
    without the wrapper. A call that fails clears the info.
    """

    version = ""

    def __init__(
        self,
        model: nn.Module,
        tau: float = 0.8,
        cluster_ratio: float = 0.5,
        temporal_segment_ratio: float = 0.25,
        verbose: bool = False,
        *,
        decoder: Any = None,
        position: str = "keep",
    ) -> None:
        check(tau, cluster_ratio, temporal_segment_ratio)
        self.model = model
        self.verbose = verbose
        places = families.locate(model)
        config: Any = places.base.config
        merge = int(config.vision_config.spatial_merge_size)
        options = {"tau": tau, "cluster_ratio": cluster_ratio, "temporal_segment_ratio": temporal_segment_ratio}
        self.method = Gated(options, merge, verbose, f"Stage 1 {self.version}")
        self._handle = self._attach(decoder, position)
        owner: nn.Module = places.base if places.outer is None else places.outer
        self._undo: list[Any] = [owner.register_forward_hook(_Forget(self), always_call=True)]
        if hasattr(type(owner), "generate"):
            self._undo.append(_Guarded(owner, self))

    def _attach(self, decoder: Any, position: str) -> Any:
        raise TypeError(f"expected a version of the first stage, got {type(self).__name__}")

    # ------------------------------------------------------------------ what is reduced
    def set_video_info(self, video_grid_thw: Any = None, pixel_values_videos: Tensor | None = None) -> None:
        """Announce the videos of the next calls, which are reduced until :meth:`clear_video_info`.

        Args:
            video_grid_thw: ``[V, 3]`` patch grids (frames, rows, columns) as the processor gives them, of all
                rows of the batch in order; None or no rows: nothing is reduced.
            pixel_values_videos: the patches, only checked against the grids and not kept.

        Raises:
            ValueError: for grids of another shape, or patches that are not as many as the grids say.
        """
        self.clear_video_info()
        if video_grid_thw is None:
            return
        try:
            grid = torch.as_tensor(video_grid_thw)
        except (TypeError, ValueError, RuntimeError) as error:
            got = type(video_grid_thw).__name__
            raise ValueError(f"expected video_grid_thw as integers of shape [V, 3], got {got}") from error
        if grid.dim() != 2 or grid.shape[1] != 3 or grid.is_floating_point() or bool((grid < 0).any()):
            _check.fail("video_grid_thw as integers of shape [V, 3]", f"{grid.dtype} {list(grid.shape)}")
        rows = [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
        patches = sum(t * h * w for t, h, w in rows)
        if pixel_values_videos is not None:
            count = list(getattr(pixel_values_videos, "shape", ()))[:1]
            if count != [patches]:
                got = str(count[0]) if count else type(pixel_values_videos).__name__
                _check.fail(f"{patches} patches for these grids", f"pixel_values_videos of {got}")
        self.method.grids = rows or None

    def clear_video_info(self) -> None:
        """Forget the videos; calls from now on are not reduced. Calling it again does nothing."""
        self.method.grids = None

    @contextmanager
    def video_info(self, video_grid_thw: Any, pixel_values_videos: Tensor | None = None) -> Iterator[None]:
        """``set_video_info`` for a ``with`` block; cleared at its end, also after an exception."""
        self.set_video_info(video_grid_thw, pixel_values_videos)
        try:
            yield
        finally:
            self.clear_video_info()

    @property
    def current_video_grid_thw(self) -> list[list[int]] | None:
        """The grids announced, None when nothing is reduced."""
        return None if self.method.grids is None else [list(g) for g in self.method.grids]

    # ------------------------------------------------------------------ the attachment
    def report(self) -> Report:
        """What the last prefill did."""
        return self._handle.report()

    @property
    def active(self) -> bool:
        """Whether the wrapper is in place."""
        return bool(self._handle.active)

    def restore(self) -> None:
        """Take the wrapper out of the model, which is as before. A second call does nothing."""
        self.clear_video_info()
        self._handle.restore()
        for part in self._undo:
            part.remove()

    def __enter__(self) -> Stage1:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "" if self.active else ", restored"
        return f"<{type(self).__name__} {self.method}{state}>"


class Qwen25VLStage1WrapperV2(Stage1):
    """PruneVid's first stage at the input of the language model: the complete features are merged there.

    Placeholders and features have been compared by then, so nothing has to be made shorter beforehand; ids
    that the call gave, attention mask, M-RoPE positions, labels and cache follow. Each video of each row is
    merged by its own grid.

    Args:
        model: a Qwen2.5-VL, Qwen2-VL or Qwen3-VL model, bare or wrapped.
        tau: mean cosine above which a slot is static, in [−1, 1].
        cluster_ratio: share kept of each group of more than 14 tokens, in (0, 1].
        temporal_segment_ratio: temporal segments per frame, in (0, 1].
        verbose: print the counts of each video.
        decoder: reductions inside the decoder, as for :func:`vidtok.attach`.
        position: ``"keep"`` or ``"renumber"``, as for :func:`vidtok.attach`.

    Raises:
        ValueError: options outside their range, an unsupported model, or one that is attached to already.

    Source: PruneVid (arXiv 2412.16117), stage 1.

    Example:
        >>> stage1 = Qwen25VLStage1WrapperV2(model=model, tau=0.8)  # doctest: +SKIP
        >>> stage1.set_video_info(video_grid_thw=inputs["video_grid_thw"])  # doctest: +SKIP
        >>> output = model.generate(**inputs, max_new_tokens=100)  # doctest: +SKIP
        >>> stage1.clear_video_info()  # doctest: +SKIP
    """

    version = "V2"

    def _attach(self, decoder: Any, position: str) -> Any:
        return attach(self.model, visual=self.method, decoder=decoder, position=position)
