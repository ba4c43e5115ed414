"""A callback that reduces visual tokens for as long as a Hugging Face ``Trainer`` trains."""

from __future__ import annotations

import inspect
import sys
import threading
from types import FrameType
from typing import Any

from torch import nn
from transformers import TrainerCallback

from vidtok import _check
from vidtok.models.attach import Handle, attach

COUNTS = ("visual_tokens_in", "visual_tokens_out", "tokens_in", "tokens_out")


class TokenReduction(TrainerCallback):
    r"""Attach to the model when training begins and take the attachment out when it ends.

    The loss of a batch is the cross entropy :math:`-\sum_i \log p(y_i) / n` over the labelled tokens that remain;
    labels are shortened with the rows, and :math:`n` (``num_items_in_batch``) stays what the ``Trainer`` counted,
    since only visual tokens go and those carry the label -100. Evaluation and prediction between training steps
    run reduced too. Weights, configuration and checkpoints are those of the model without vidtok.

    A ``Trainer`` tells its callbacks nothing about exceptions. After one the attachment is taken out by the next
    call of the model, the next ``vidtok.attach`` on it, the next training, ``restore()``, or at once at the end of a
    ``with`` block::

        with TokenReduction(visual="uniform:ratio=0.5") as reduction:
            Trainer(model, args, train_dataset=..., callbacks=[reduction]).train()

    Args:
        vision: token merging inside the vision tower, as in :func:`vidtok.attach`, also of models without a language
            model; frame positions (``handle.vision[0].positions``) are no parameters of the model, so that the
            optimizer has to be given them.
        visual: reduction at the input of the language model, as in :func:`vidtok.attach`.
        decoder: reduction inside the decoder, as in :func:`vidtok.attach`.
        position: ``"keep"`` or ``"renumber"``.
        log: add the number of tokens since the last log line to the logs: ``visual_tokens_in`` and
            ``visual_tokens_out`` of all videos, ``tokens_in`` and ``tokens_out`` of all rows, without padding,
            of this process. Reading them waits for the device at each step.
        **options: further arguments of :func:`vidtok.attach`.

    Raises:
        ValueError: at the beginning of training, for what :func:`vidtok.attach` refuses, and for label smoothing.

    Example:
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model, args, train_dataset=data, callbacks=[TokenReduction(visual="prunevid:tau=0.8")]
        ... )
    """

    def __init__(
        self,
        *,
        vision: Any = None,
        visual: Any = None,
        decoder: Any = None,
        position: str = "keep",
        log: bool = False,
        **options: Any,
    ) -> None:
        if not any(v is not None for v in (vision, visual, decoder, *options.values())):
            raise ValueError("expected vision=, visual= or decoder= to name a reduction, got none of them")
        self.options = {"vision": vision, "visual": visual, "decoder": decoder, "position": position, **options}
        self.log = log
        self.handle: Handle | None = None
        self._training: _Running | None = None
        self._watch: Any = None
        self._counted = dict.fromkeys(COUNTS, 0)

    # ------------------------------------------------------------------ attachment
    def attach(self, model: nn.Module) -> Handle:
        """Attach to ``model``, which may be wrapped; what this callback attached before is taken out."""
        self.restore()
        self.handle = attach(model, **self.options)
        return self.handle

    def restore(self) -> None:
        """Take the attachment out; does nothing where there is none."""
        if self._watch is not None:
            self._watch.remove()
        if self.handle is not None:
            self.handle.restore()
        self._training = self._watch = None

    def __enter__(self) -> TokenReduction:
        return self

    def __exit__(self, *error: Any) -> None:
        self.restore()

    def __deepcopy__(self, memo: Any) -> TokenReduction:
        return type(self)(log=self.log, **self.options)

    # ------------------------------------------------------------------ events of the Trainer
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Attach to the model that is about to be trained."""
        if getattr(args, "n_gpu", 1) > 1:
            _check.fail(
                "one process per GPU (torchrun or accelerate launch)", f"nn.DataParallel over {args.n_gpu} GPUs"
            )
        shortens = self.options["visual"] is not None or self.options["decoder"] is not None
        if getattr(args, "label_smoothing_factor", 0) and shortens:
            _check.fail(
                "label_smoothing_factor=0, because smoothing takes labels of the whole rows to logits of reduced ones",
                str(args.label_smoothing_factor),
            )
        handle = self.attach(model)
        self._counted = dict.fromkeys(COUNTS, 0)
        self._training = _Running.find()
        if self._training is not None:
            handle.running = self._training
            self._watch = model.register_forward_pre_hook(_Watch(self), prepend=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as it was."""
        self.restore()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the tokens of a batch whose gradients are accumulated."""
        self._count()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the tokens of the last batch of a step."""
        self._count()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add the counts to the line that is logged."""
        if not self.log or not logs or "loss" not in logs:
            return
        logs.update(self._counted)
        if state.log_history:
            state.log_history[-1].update(self._counted)
        self._counted = dict.fromkeys(COUNTS, 0)

    def _count(self) -> None:
        if not self.log or self.handle is None:
            return
        report = self.handle.report()
        counts = (
            sum(sample.tokens_in for sample in report.samples),
            sum(sample.tokens_out for sample in report.samples),
            sum(report.tokens_in),
            sum(report.tokens_out),
        )
        for name, count in zip(COUNTS, counts):
            self._counted[name] += count


class _Watch:
    """On the trained model: takes the attachment out when its training was left by an exception."""

    def __init__(self, reduction: TokenReduction) -> None:
        self.reduction = reduction

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        training = self.reduction._training
        if training is not None and not training():
            self.reduction.restore()

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _get_nothing, ()


def _nothing(*_: Any) -> None:
    """What the watch becomes in a copied or pickled model."""


def _get_nothing() -> Any:
    return _nothing


class _Running:
    """Whether a call of ``Trainer.train`` still runs: its frame is on the stack of the thread that began it."""

    def __init__(self, frame: FrameType) -> None:
        self.frame, self.thread = frame, threading.get_ident()

    @staticmethod
    def find() -> _Running | None:
        """The call of the Trainer that this callback serves; None in a loop of another library."""
        from transformers import Trainer

        code = getattr(inspect.unwrap(Trainer.train), "__code__", None)
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        return None if frame is None else _Running(frame)

    def __call__(self) -> bool:
        mine = threading.get_ident() == self.thread
        frame = sys._getframe() if mine else sys._current_frames().get(self.thread)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False
