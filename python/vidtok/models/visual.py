"""The language-model-input hook: visual tokens are reduced once, before the first decoder layer."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check, ops
from vidtok.models import cache as caches
from vidtok.models import columns, families
from vidtok.models.cache import State
from vidtok.models.families import Encoded, Places, Visual
from vidtok.models.report import Record, Span
from vidtok.plan import Plan


class Call:
    """One forward pass of a model in one thread."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.begun = False
        self.labels: Tensor | None = None
        self.logits_to_keep: Any = 0
        self.visual: Visual | None = None
        self.media = False
        self.grids: dict[str, list[list[int]]] = {}
        self.encoded: list[Span] = []
        self.state: State | None = None
        self.record: Record | None = None
        self.stage = ""
        self.forward: Span | None = None


class VisualHook:
    """Hooks of one attachment; what belongs to a call lives in :class:`Call` or on the call's cache."""

    def __init__(self, places: Places, method: Any, position: str) -> None:
        self.method, self.position = method, position
        self.images = bool(getattr(method, "images", False))
        self.active = True
        self.last: Record | None = None
        self._calls = threading.local()

    # ------------------------------------------------------------------ the call
    def _call(self) -> Call | None:
        return getattr(self._calls, "call", None)

    def outer_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On the model with the head: a new call; labels become a private copy that can be shortened."""
        call = self._calls.call = Call(module)
        arguments = families.named_arguments(module, args, kwargs)
        call.logits_to_keep = arguments.get("logits_to_keep", 0)
        # Read here already: accelerate copies the arguments on their way to the base model.
        call.grids, call.encoded = families.tags(arguments)
        labels = arguments.get("labels")
        if labels is None:
            return None
        # The model hands this very tensor to its loss; the prefill shortens it in place, so every
        # version computes its own loss with its own arguments.
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        call.labels = labels.clone() if device is None else labels.to(device, copy=True)
        return (), {**arguments, "labels": call.labels}

    def base_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """On the model without head: find the visual tokens."""
        call = self._call()
        arguments = families.named_arguments(module, args, kwargs)
        if call is None or call.begun:
            call = self._calls.call = Call(module)
            call.grids, call.encoded = families.tags(arguments)
        call.begun = True
        call.media = families.has_media(arguments)
        if call.media:
            call.visual = families.find_visual(module, arguments, self.images, call.grids)
        else:
            families.refuse_blind(module, arguments)

    def post(self, module: nn.Module, *_: Any) -> None:
        """End of the call that ``module`` began, also after an exception."""
        call = self._call()
        if call is not None and call.owner is module:
            self._calls.call = None

    # ------------------------------------------------------------------ the vision tower
    def vision_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start of the vision tower."""
        pixels = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        self._calls.vision = None if pixels is None else Span(pixels.device)

    def vision_post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End of the vision tower: its output carries grids and time to the prefill."""
        span, self._calls.vision = getattr(self._calls, "vision", None), None
        if span is not None:
            span.stop()
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        call = self._call()
        if call is not None:
            call.encoded = [*call.encoded, span] if span is not None else call.encoded
        elif isinstance(grid, Tensor):
            families.tag(output, Encoded(grid, span))

    # ------------------------------------------------------------------ the language model
    def language_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reduce a prefill, or make a later pass fit the reduced cache."""
        call = self._call()
        arguments = families.named_arguments(module, args, kwargs)
        cache = arguments.get("past_key_values")
        state = caches.state_of(cache)
        if state is None and (call is None or not call.media):
            return None
        if call is None or call.owner is module:
            call = self._calls.call = Call(module)
            call.begun = True
        embeds = arguments.get("inputs_embeds")
        if embeds is None:
            embed: Any = module.get_input_embeddings
            embeds = embed()(arguments["input_ids"])
            arguments = {**arguments, "input_ids": None, "inputs_embeds": embeds}
        if call.media:
            changed = self._prefill(call, arguments, embeds, cache, state)
        else:
            changed = self._continue(call, arguments, embeds, cache, state)
        call.forward = Span(embeds.device)
        return None if changed is None else ((), changed)

    def language_post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The cache learns what the pass put into it."""
        call = self._call()
        if call is None or call.record is None:
            return
        if call.forward is not None:
            call.record.add(call.stage, call.forward.stop())
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if call.state is not None and cache is not None:
            caches.bind(cache, call.state)
        if call.stage == "prefill":
            self.last = call.record
        if call.owner is module:
            self._calls.call = None

    def _prefill(
        self, call: Call, arguments: dict[str, Any], embeds: Tensor, cache: Any, state: State | None
    ) -> dict[str, Any] | None:
        batch, length = embeds.shape[:2]
        device = embeds.device
        past = caches.physical_length(cache)
        dropped = 0 if state is None else state.dropped
        given = arguments.get("attention_mask")
        real = columns.new_columns(given, batch, length, past, cache, device)
        plan, decide = self._decide(embeds, call.visual)
        call.stage = "prefill"
        record = call.record = Record([] if call.visual is None else call.visual.units, plan, (batch, length), real)
        for span in call.encoded:
            record.add("vision", span)
        record.add("decide", decide)
        if plan is None or call.visual is None:
            return self._continue(call, arguments, embeds, cache, state, record)
        if plan.is_gather and plan.num_out == plan.num_in and self.position == "keep":
            return self._continue(call, arguments, embeds, cache, state, record)
        _refuse(arguments, call, cache, length)
        move = Span(device)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        visual = call.visual.columns.to(device)
        rows = record.rows = plan.lift(visual, cu, real=real, dense=True)
        valid = rows.valid().view(batch, -1)
        width = valid.shape[1]
        old = columns.past_columns(state, given, length, past, device)
        mask = columns.joined(old, valid if rows.padded else None, batch, past, width, cache, device)
        changed = dict(arguments)
        changed["inputs_embeds"] = ops.plan_apply(rows, embeds)
        # Always explicit: without a mask, gaps in positions would be read as borders between packed rows.
        full = torch.ones(batch, past + width, dtype=torch.long, device=device)
        changed["attention_mask"] = full if mask is None else mask.long()
        number = columns.consecutive(mask, batch, past, width, device)
        changed["position_ids"] = self._positions(arguments["position_ids"], rows, number)
        if arguments.get("visual_pos_masks") is not None:
            self._deepstack(changed, plan, rows, visual, real)
        if "cache_position" in changed:
            changed["cache_position"] = torch.arange(past, past + width, device=device)
        if call.labels is not None:
            _shorten(call.labels, rows, valid)
        last = int((visual % length).max())
        call.state = State(
            self,
            record,
            reduced=True,
            mask=mask,
            dropped=dropped + length - width,
            length=past + width,
            floor=past + width - (length - 1 - last),
        )
        record.add("move", move.stop())
        return changed

    def _continue(
        self,
        call: Call,
        arguments: dict[str, Any],
        embeds: Tensor,
        cache: Any,
        state: State | None,
        record: Record | None = None,
    ) -> dict[str, Any] | None:
        """A pass that reduces nothing: untouched, unless its cache holds a reduced prompt."""
        call.stage = "decode" if record is None else "prefill"
        call.record = record or (state.record if state is not None else None)
        if state is None or not state.reduced:
            call.state = None if record is None else State(self, record)
            return None
        batch, length = embeds.shape[:2]
        device = embeds.device
        past = caches.physical_length(cache)
        given = arguments.get("attention_mask")
        new = columns.new_columns(given, batch, length, past, cache, device)
        old = columns.past_columns(state, given, length, past, device)
        mask = columns.joined(old, new, batch, past, length, cache, device)
        changed = dict(arguments)
        changed["attention_mask"] = None if mask is None else mask.long()
        position = arguments.get("position_ids")
        _refuse_length(position, length)
        if self.position == "renumber":
            number = columns.consecutive(mask, batch, past, length, device)
            changed["position_ids"] = number.expand(3 if position is None else position.shape[0], -1, -1)
        elif position is None:
            start = past + state.dropped
            changed["position_ids"] = torch.arange(start, start + length, device=device).expand(3, batch, length)
        if "cache_position" in changed:
            changed["cache_position"] = torch.arange(past, past + length, device=device)
        call.state = State(
            self,
            call.record,
            reduced=True,
            mask=mask,
            dropped=state.dropped,
            length=past + length,
            floor=state.floor,
        )
        return changed

    # ------------------------------------------------------------------ steps of a prefill
    @torch.no_grad()
    def _decide(self, embeds: Tensor, visual: Visual | None) -> tuple[Plan | None, Span | None]:
        if visual is None:
            return None, None
        span = Span(embeds.device)
        features = embeds.detach().reshape(-1, embeds.shape[-1])[visual.columns.to(embeds.device)]
        grids = torch.tensor([unit.grid_thw for unit in visual.units])
        plan = self.method(features, grids)
        if not isinstance(plan, Plan):
            _check.fail("a method that returns a Plan", type(plan).__name__, TypeError)
        if plan.num_in != features.shape[0] or plan.num_sequences != len(visual.units):
            _check.fail(
                f"a plan over {features.shape[0]} tokens in {len(visual.units)} sequences",
                f"one over {plan.num_in} tokens in {plan.num_sequences}",
            )
        if plan.device != embeds.device:
            plan = plan.to(embeds.device)
        return plan, span.stop()

    def _positions(self, position: Tensor, rows: Plan, number: Tensor) -> Tensor:
        if self.position == "renumber":
            return number.expand(position.shape[0], -1, -1)
        (kept,) = ops.position_remap(rows, position.to(number.device).expand(-1, number.shape[0], -1), dim=-1)
        if kept.shape[0] == 4:
            # Row 0 only tells packed rows apart: gaps in it would be read as borders between sequences.
            kept = torch.cat([number[None], kept[1:]])
        return kept

    @staticmethod
    def _deepstack(changed: dict[str, Any], plan: Plan, rows: Plan, at: Tensor, real: Tensor | None) -> None:
        """Deepstack rows are the visual tokens in packed order: the same plan, counted in them."""
        visual = changed["visual_pos_masks"].to(at.device)
        flat = visual.reshape(-1)
        rank = flat.long().cumsum(0) - 1
        count = torch.tensor([0, int(rank[-1]) + 1], dtype=torch.int32, device=at.device)
        inner = Plan(
            count, torch.zeros_like(count), plan.anchor, plan.csr_member, plan.csr_offset, plan.csr_weight, plan.num_in
        ).lift(rank[at], count, real=None if real is None else real.reshape(-1)[flat])
        changed["deepstack_visual_embeds"] = [
            ops.plan_apply(inner if e.device == at.device else inner.to(e.device), e)
            for e in changed["deepstack_visual_embeds"]
        ]
        (changed["visual_pos_masks"],) = ops.position_remap(rows, visual, dim=-1, fill=0)


def _shorten(labels: Tensor, rows: Plan, valid: Tensor) -> None:
    """Give the labels of a call, in place, the tokens of the reduced rows."""
    (short,) = ops.position_remap(rows, labels.to(valid.device), dim=-1, fill=-100)
    # A padding column would predict the first real token, and only in rows that have one.
    first = valid & ~torch.nn.functional.pad(valid[:, :-1], (1, 0))
    short = short.masked_fill(first, -100)
    labels.resize_(short.shape).copy_(short)


def _refuse(arguments: dict[str, Any], call: Call, cache: Any, length: int) -> None:
    """Raise for calls in which dropping tokens would silently change something else."""
    if isinstance(call.logits_to_keep, Tensor):
        _check.fail("logits_to_keep as a number, because tokens are dropped", "a tensor")
    if any(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise ValueError("expected padded rows, got rows packed by cu_seq_lens, which cannot be reduced")
    position = arguments.get("position_ids")
    _refuse_length(position, length)
    if position is None or position.dim() == 2 or _is_text(position, call.visual):
        raise ValueError(
            "expected M-RoPE positions for the visual tokens, got 1-D text positions; "
            "pass the processor's mm_token_type_ids, or position_ids of shape [3, B, L]"
        )
    bare = cache is None and arguments.get("attention_mask") is None and position.shape[0] == 4
    if bare and bool((position[0].diff(dim=-1) < 0).any()):
        raise ValueError("expected padded rows, got rows packed by restarting position_ids, which cannot be reduced")


def _is_text(position: Tensor, visual: Visual | None) -> bool:
    """Whether visual tokens got 1-D positions: height and width ids of a real grid differ somewhere."""
    if visual is None or all(h * w < 2 for _, h, w in (unit.grid_thw for unit in visual.units)):
        return False
    at = visual.columns.to(position.device)
    at = at % position.shape[-1] if position.shape[1] == 1 else at
    height, width = position[-2:].flatten(1)[:, at]
    return torch.equal(height, width)


def _refuse_length(position: Tensor | None, length: int) -> None:
    if position is not None and position.shape[-1] != length:
        _check.fail(
            f"position_ids for the {length} tokens of this pass",
            f"{position.shape[-1]} (give it no attention_mask of the whole sequence without position_ids)",
        )
