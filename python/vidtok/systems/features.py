"""PruneVid's first stage where features leave the vision tower, with ids, mask and positions made shorter to match."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import ops
from vidtok.models import cache as caches
from vidtok.models import families
from vidtok.models.attach import install
from vidtok.models.cache import State
from vidtok.models.call import Call
from vidtok.models.families import Visual
from vidtok.models.report import Span
from vidtok.models.visual import InputHook
from vidtok.plan import Plan
from vidtok.systems.stage1 import Stage1, StandIn, own

__all__ = ["Qwen25VLStage1Wrapper"]

_NAME = "get_video_features"
_TAG = "_vidtok_merged"
# Arguments that have an entry per patch or video and none per token.
_PER_MEDIA = (
    "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
    "mm_encoder_outputs",
)  # fmt: skip


class _Merging(StandIn):
    """``get_video_features`` of the model, then the merge."""

    def __init__(self, base: nn.Module, hook: FeatureHook) -> None:
        super().__init__(base, _NAME)
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        early = self.hook.early()
        if early is not None and early.features is not None:
            return early.features
        output = self.original(*args, **kwargs)
        names = [name for name in inspect.signature(own(self.module, _NAME)).parameters if name != "kwargs"]
        grid = {**dict(zip(names, args)), **kwargs}.get("video_grid_thw")
        return self.hook.merge(output, grid)


@dataclass
class _Early:
    """What one call has done before the language model's turn."""

    call: Call
    plan: Plan
    span: Span
    features: Any = None
    done: bool = False


class FeatureHook(InputHook):
    """The input hook, moved ahead of the model without head: features are merged where they are made."""

    @property
    def gate(self) -> Any:
        """The wrapper's method, which :func:`vidtok.spec.resolve` has put into a pipeline."""
        return self.method.stages[0]

    def early(self) -> _Early | None:
        """What this thread's call has done; None before, and for calls that merge nothing."""
        early: _Early | None = getattr(self._calls, "early", None)
        return early if early is not None and early.call is self._call() else None

    def merge(self, output: Any, grid: Any) -> Any:
        """The output of ``get_video_features`` with the features of each video merged; the plan rides along."""
        parts = output.pooler_output if hasattr(output, "pooler_output") else output
        told = self.active and self.gate.grids is not None
        if not (told and isinstance(grid, Tensor) and isinstance(parts, (list, tuple)) and len(parts)):
            return output
        features = torch.cat(tuple(parts))
        side = int(self.gate.merge)
        span = Span(features.device)
        with torch.no_grad():
            plan = self.gate(features.detach(), torch.tensor([[t, h // side, w // side] for t, h, w in grid.tolist()]))
        span.stop()
        merged = ops.plan_apply(plan, features).split(plan.cu_seqlens_out.diff().tolist())
        if not hasattr(output, "pooler_output"):
            self._calls.merged = (plan, span)
            return merged
        output.pooler_output = merged
        setattr(output, _TAG, (plan, span))
        return output

    def base_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Merge, and give the model ids, mask and positions of what remains."""
        self._calls.early = None
        arguments = families.named_arguments(module, args, kwargs)
        _refuse_repeated((arguments.get("mm_encoder_outputs") or {}).get("video"))
        returned = super().base_pre(module, args, kwargs)
        call = self._call()
        if call is None or call.visual is None or self.gate.grids is None:
            return returned
        if not any(unit.kind == "video" for unit in call.visual.units):
            return returned
        early = self._calls.early = self._merged(call, module, arguments)
        cache, given = arguments.get("past_key_values"), arguments.get("inputs_embeds")
        embed: Any = module.get_input_embeddings
        embeds = embed()(arguments["input_ids"]) if given is None else given
        filled = {name: value for name, value in arguments.items() if name not in _PER_MEDIA}
        filled["inputs_embeds"] = embeds
        if filled.get("position_ids") is None:
            filled["position_ids"] = _full_positions(module, {**arguments, "inputs_embeds": embeds})
        changed = super()._prefill(call, filled, embeds, cache, caches.state_of(cache))
        early.done = True
        if changed is None:
            return returned
        rows = None if call.record is None else call.record.rows
        # Placeholders are told by id or by embedding, of which a mean would not be the same to the last bit.
        changed["inputs_embeds"] = given
        if given is not None and rows is not None:
            (changed["inputs_embeds"],) = ops.position_remap(rows, given, dim=1)
        return (), {**arguments, **changed}

    def _merged(self, call: Call, module: nn.Module, arguments: dict[str, Any]) -> _Early:
        """Merge the features of a call, or take the plan of those that came with it."""
        output = (arguments.get("mm_encoder_outputs") or {}).get("video")
        features = None
        self._calls.merged = None
        if output is None:
            take: Any = getattr(module, _NAME)
            output = features = take(arguments["pixel_values_videos"], arguments.get("video_grid_thw"))
        found = getattr(output, _TAG, None) or self._calls.merged
        self._calls.merged = None
        if found is None:
            raise ValueError("expected video features that get_video_features made while attached, got others")
        plan, span = found
        return _Early(call, plan, span, features)

    def _decide(self, embeds: Tensor, visual: Visual | None) -> tuple[Plan | None, Span | None]:
        early = self.early()
        if early is None or visual is None:
            return None, None
        plan = early.plan
        if len(visual.units) != plan.num_sequences or sum(visual.sizes) != plan.num_in:
            raise ValueError(f"expected the {plan.num_sequences} videos that were merged, got {len(visual.units)}")
        return plan.to(embeds.device) if plan.device != embeds.device else plan, early.span

    def _prefill(
        self, call: Call, arguments: dict[str, Any], embeds: Tensor, cache: Any, state: State | None
    ) -> dict[str, Any] | None:
        early = self.early()
        if early is not None and early.done:
            return None
        return super()._prefill(call, arguments, embeds, cache, state)


def _refuse_repeated(output: Any) -> None:
    """Raise where ``generate`` has repeated merged features, by counting placeholders that were not merged yet."""
    found = getattr(output, _TAG, None)
    if found is not None and len(output.pooler_output) != found[0].num_sequences:
        raise ValueError(
            f"expected the features of {found[0].num_sequences} merged videos, got {len(output.pooler_output)}: this "
            "transformers repeats them for beams and num_return_sequences by their unmerged length, use version 2"
        )


def _full_positions(module: Any, arguments: dict[str, Any]) -> Any:
    """M-RoPE positions of the complete ids, from the model's own function of the installed version."""
    compute = getattr(module, "compute_3d_position_ids", None)
    if compute is not None:
        return compute(**{name: arguments.get(name) for name in inspect.signature(compute).parameters})
    if caches.physical_length(arguments.get("past_key_values")):
        raise ValueError("expected position_ids with a video of a later turn, got none")
    names = inspect.signature(module.get_rope_index).parameters
    positions, module.rope_deltas = module.get_rope_index(**{name: arguments.get(name) for name in names})
    return positions


class Qwen25VLStage1Wrapper(Stage1):
    """PruneVid's first stage in ``get_video_features``: what the model compares and places is merged already.

    ``model.get_video_features`` returns merged features while videos are announced, and input ids,
    attention mask, M-RoPE positions (those of the complete prompt) and labels are made shorter to match
    before the model sees them. Its logits are those of :class:`Qwen25VLStage1WrapperV2`; it exists to
    compare the two.

    Args:
        model: a Qwen2.5-VL or Qwen2-VL model, bare or wrapped.
        tau: mean cosine above which a slot is static, in [−1, 1].
        cluster_ratio: share kept of each group of more than 14 tokens, in (0, 1].
        temporal_segment_ratio: temporal segments per frame, in (0, 1].
        verbose: print the counts of each video.
        decoder: reductions inside the decoder, as for :func:`vidtok.attach`.
        position: ``"keep"`` or ``"renumber"``, as for :func:`vidtok.attach`.

    Raises:
        ValueError: options outside their range, a model of another family, or one that is attached to already.

    Source: PruneVid (arXiv 2412.16117), stage 1.

    Example:
        >>> stage1 = Qwen25VLStage1Wrapper(model=model)  # doctest: +SKIP
        >>> with stage1.video_info(inputs["video_grid_thw"]):  # doctest: +SKIP
        ...     output = model.generate(**inputs)
    """

    version = "V1"

    def _attach(self, decoder: Any, position: str) -> Any:
        places = families.locate(self.model)
        if places.family.name not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(
                f"expected a Qwen2-VL or Qwen2.5-VL model for version 1, got {places.family.name}, "
                "whose features enter several layers; version 2 takes it"
            )
        handle = install(FeatureHook, self.model, self.method, decoder, position)
        self._merging = _Merging(places.base, handle._hook)  # type: ignore[arg-type]
        return handle

    def restore(self) -> None:
        """Take the wrapper out of the model, which is as before. A second call does nothing."""
        super().restore()
        self._merging.remove()
