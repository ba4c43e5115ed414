"""One call that puts token reduction into a model, and takes it out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vidtok import _check, spec
from vidtok.models import families, versions
from vidtok.models.cost import costs
from vidtok.models.report import Report
from vidtok.models.visual import InputHook

if TYPE_CHECKING:
    from vidtok.merge.attach import Merging
    from vidtok.models.transv import TransV

_POSITIONS = ("keep", "renumber")


def _inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copied or pickled model."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """A forward hook that stays with its module: copies and pickles of the module get an inert one."""

    def __init__(self, place: str, owner: InputHook, run: Any) -> None:
        self.place, self.owner, self.run = place, owner, run

    # A compiled model breaks its graph here: plans have sizes that only the data knows.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs) if self.owner.active else None

    def __deepcopy__(self, memo: Any) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


def _forget_compiled() -> None:
    """Drop compiled code, which would go on with the hooks that it was compiled with: it does not look for others."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if getattr(frames, "FRAME_COUNTER", 0):
        torch.compiler.reset()


class Handle:
    """An attachment: ``restore()`` takes it out; also a context manager."""

    def __init__(self, hook: InputHook | None, handles: list[Any], spec: str, vision: Sequence[Merging] = ()) -> None:
        self._hook, self._handles, self.spec = hook, handles, spec
        #: The token merging of each vision tower.
        self.vision: Sequence[Merging] = vision
        #: Whether the loop that the attachment was made for still runs; None for one that lasts until ``restore()``.
        self.running: Callable[[], bool] | None = None
        if hook is not None:
            hook.handle = self

    @property
    def active(self) -> bool:
        """Whether the attachment is in place."""
        return self._hook.active if self._hook is not None else any(merging.active for merging in self.vision)

    @property
    def transv(self) -> TransV | None:
        """The trainable module of ``Drop(..., merge="transv")``; its parameters are not the model's."""
        decoder = None if self._hook is None else self._hook.decoder
        return None if decoder is None else decoder.transv

    def restore(self) -> None:
        """Take the attachment out; the model is as before. A second call does nothing."""
        if self.active:
            _forget_compiled()
        self.running = None
        if self._hook is not None:
            self._hook.active = False
        while self._handles:
            self._handles.pop().remove()
        for merging in self.vision:
            merging.restore()

    def report(self) -> Report:
        """What the last prefill, or the last pass of a vision tower, did; empty before the first."""
        report = Report()
        if self._hook is not None and self._hook.last is not None:
            report = self._hook.last.report(costs(self._hook.language_model))
        if not self.vision:
            return report
        from vidtok.models.vision import towers

        found = towers(self.vision)
        seconds = [tower.seconds for tower in found if tower.seconds is not None]
        times = {"vision": sum(seconds), **report.times} if seconds else report.times
        return replace(report, vision=found, times=times)

    def tokens(
        self, where: Sequence[tuple[int, int, int]] | Tensor, frames: int | Sequence[int] = 1
    ) -> AbstractContextManager[None]:
        """Name the visual tokens of the calls inside a ``with`` block, in this thread.

        A plain language model cannot tell them from text; a video-language model takes these in place of
        those that it finds itself.

        Args:
            where: ``(row, start, stop)`` of each video, in columns of the rows as they are given, padding
                and earlier turns counted; or bool ``[B, L]``, whose stretches of True are videos each
                (with beam search only this form knows the number of rows).
            frames: of each video, or of all; a video's tokens lie frame by frame.

        Raises:
            ValueError: stretches that overlap, or that frames do not divide.

        Example:
            >>> with handle.tokens([(0, 4, 68)], frames=16):  # doctest: +SKIP
            ...     model.generate(inputs_embeds=embeds, attention_mask=mask)
        """
        if self._hook is None:
            raise ValueError(
                "expected an attachment with visual= or decoder= to name tokens for, got one with vision= only"
            )
        return self._hook.named.use(where, frames)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<vidtok attachment {self.spec}{'' if self.active else ', restored'}>"


def attach(
    model: nn.Module,
    *,
    vision: Any = None,
    visual: Any = None,
    decoder: Any = None,
    position: str = "keep",
    visual_token_id: int | None = None,
) -> Handle:
    r"""Reduce the visual tokens of a Hugging Face video-language model.

    At the input of the language model each video's tokens :math:`x` become :math:`P x` with the plan
    :math:`P` that ``visual`` decides from them; before the layers that ``decoder`` names, more of them
    are dropped. Positions, attention masks, labels, deepstack features and the cache follow. Text
    tokens, weights and the model's class stay as they are.

    Args:
        model: a model of a supported family (docs/models.md lists them) or its base model, bare or wrapped.
        visual: a spec such as ``"prunevid:tau=0.8"``, or a callable ``(features [N, C], grid_thw
            [V, 3]) -> Plan`` with one sequence per video; images stay whole unless it has a true
            attribute ``images``.
        decoder: a spec such as ``"uni_7_0.5-attn_14_0.25"`` (kind, 0-based layer, share of the visual
            tokens that layer still sees), or a :class:`vidtok.Drop`.
        vision: a spec such as ``"tome:r=8"`` or a :class:`vidtok.merge.ToMe`: tokens that merge inside the
            vision tower, also of models without a language model (docs/vision.md lists them).
        position: ``"keep"`` leaves every kept token its coordinates and text its positions;
            ``"renumber"`` counts the tokens that remain, decoded ones too.
        visual_token_id: for plain language models only: the id whose stretches in ``input_ids`` are
            visual tokens, a frame each; without it :meth:`Handle.tokens` names them.

    Returns:
        A handle with ``restore()`` and ``report()``, which is also a context manager.

    Raises:
        ValueError: unsupported model class or wrapper, a spec that does not parse, a second
            attachment at the same place.

    Example:
        >>> with vidtok.attach(model, visual="uniform:ratio=0.5") as handle:  # doctest: +SKIP
        ...     model.generate(**inputs)
        ...     print(handle.report())
    """
    if vision is None and visual is None and decoder is None:
        raise ValueError(
            "expected vision= to name a method such as 'tome:r=8', visual= one such as 'uniform:ratio=0.5', or "
            "decoder= stages such as 'uni_7_0.5', got nothing to attach"
        )
    if vision is None:
        return install(InputHook, model, visual, decoder, position, visual_token_id)
    from vidtok.merge.spec import resolve
    from vidtok.models import towers

    options = resolve(vision)
    merges = towers.attach_vision(model, options)
    part = f"vision={str(options)!r}"
    if visual is None and decoder is None:
        return Handle(None, [], part, merges)
    try:
        handle = install(InputHook, model, visual, decoder, position, visual_token_id)
    except BaseException:
        for merging in merges:
            merging.restore()
        raise
    handle.vision, handle.spec = merges, f"{part} {handle.spec}"
    return handle


def detach(model: nn.Module) -> bool:
    """Take out what :func:`attach` put into a model, vision towers included, also when nobody holds its handle.

    Args:
        model: as given to :func:`attach`, or the same model in another wrapper.

    Returns:
        Whether there was an attachment.

    Raises:
        ValueError: for a model that could not have one.

    Example:
        >>> vidtok.detach(model)  # doctest: +SKIP
        True
    """
    merges = {id(slot.owner): slot.owner for m in model.modules() if (slot := vars(m).get("_vidtok")) is not None}
    try:
        hooks = list(families.locate(model).language_model._forward_pre_hooks.values())
    except ValueError:
        from vidtok.models import towers

        if not merges and not towers.locate(model):
            raise
        hooks = []
    owners = [h.owner for h in hooks if isinstance(h, _Hook)]
    found = [owner.handle for owner in owners if owner.handle is not None and owner.active]
    for handle in found:
        handle.restore()
    for merging in merges.values():
        merging.restore()
    return bool(found or merges)


def install(
    kind: type[InputHook], model: nn.Module, visual: Any, decoder: Any, position: str, token: int | None = None
) -> Handle:
    """Put a hook at the input of the language model, and what ``decoder`` names inside it; see :func:`attach`."""
    if position not in _POSITIONS:
        _check.fail(f"position to be one of {', '.join(map(repr, _POSITIONS))}", repr(position))
    places = families.locate(model)
    versions.check(places)
    if token is not None and not places.family.plain:
        raise ValueError(
            f"expected visual_token_id= for a plain language model only, got it for {type(places.base).__name__}, "
            "whose visual tokens are known"
        )
    method = None if visual is None else spec.resolve(visual)
    for h in list(places.language_model._forward_pre_hooks.values()):
        if not isinstance(h, _Hook) or h.place != "visual" or not h.owner.active:
            continue
        earlier = h.owner.handle
        if earlier is not None and earlier.running is not None and not earlier.running():
            earlier.restore()
            continue
        raise ValueError(
            "expected a model without attachment at the language-model input, got one; restore() it first, "
            "or vidtok.detach(model)"
        )
    dropper = None
    if decoder is not None:
        from vidtok.models.decoder import DecoderHook
        from vidtok.models.drop import resolve_drop

        drop = resolve_drop(decoder)
        dropper = DecoderHook(places.language_model, drop, position)
    hook = kind(places, method, position, dropper)
    hook.named.token = token
    rotary = []
    if method is not None and position == "keep" and places.family.positions == "rope":
        rotary = [m for m in places.language_model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        if not rotary:
            raise ValueError(
                f"expected a rotary embedding in {type(places.language_model).__name__} to keep positions by, "
                "got none; use position='renumber'"
            )
    _forget_compiled()

    def before(module: nn.Module, run: Any) -> Any:
        return module.register_forward_pre_hook(_Hook("visual", hook, run), with_kwargs=True)

    def after(module: nn.Module, run: Any, always: bool = False) -> Any:
        return module.register_forward_hook(_Hook("visual", hook, run), with_kwargs=True, always_call=always)

    handles = []
    if places.outer is not None:
        handles += [before(places.outer, hook.outer_pre), after(places.outer, hook.post, True)]
    handles += [before(places.base, hook.base_pre), after(places.base, hook.post, True)]
    for tower in places.towers:
        handles += [before(tower, hook.vision_pre), after(tower, hook.vision_post)]
    handles += [before(places.language_model, hook.language_pre), after(places.language_model, hook.language_post)]
    handles += [before(module, hook.rotary_pre) for module in rotary]
    if dropper is not None:
        handles += [(before if when == "pre" else after)(module, run) for module, when, run in dropper.hooks()]
    parts = {"visual": method, "decoder": dropper and dropper.drop}
    return Handle(hook, handles, " ".join(f"{name}={str(part)!r}" for name, part in parts.items() if part is not None))
