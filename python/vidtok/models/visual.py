"""The language-model-input hook: visual tokens are found, and reduced once before the first decoder layer."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vidtok import _check, ops
from vidtok.models import cache as caches
from vidtok.models import columns, families, generation, refusals
from vidtok.models import packed as packing
from vidtok.models.cache import State
from vidtok.models.call import Call
from vidtok.models.families import Encoded, Places, Visual
from vidtok.models.named import Named
from vidtok.models.packed import Packed
from vidtok.models.report import Record, Span
from vidtok.models.tokens import Tokens
from vidtok.plan import Plan

if TYPE_CHECKING:
    from vidtok.models.decoder import DecoderHook


class InputHook:
    """Hooks of one attachment; what belongs to a call lives in :class:`Call` or on the call's cache."""

    def __init__(self, places: Places, method: Any, position: str, decoder: DecoderHook | None = None) -> None:
        self.family, self.method, self.position, self.decoder = places.family, method, position, decoder
        self.base: nn.Module = places.base
        self.named = Named()
        self.images = bool(getattr(method, "images", False))
        if self.images and not self.family.images:
            raise ValueError(f"expected images=false for {self.family.name}, whose images have no known grid, got true")
        self.active = True
        self.language_model = places.language_model
        self.handle: Any = None
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
        call.router_loss = arguments.get("attention_mask") is not None and refusals.routes(module, arguments)
        # Read here already: accelerate copies the arguments on their way to the base model.
        call.towers, call.encoded = families.tags(arguments)
        labels = arguments.get("labels")
        if labels is None:
            return None
        # The model hands this very tensor to its loss; the prefill shortens it in place, so every
        # version computes its own loss with its own arguments.
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        call.labels = labels.clone() if device is None else labels.to(device, copy=True)
        return (), {**arguments, "labels": call.labels}

    def base_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On the model without head: find the visual tokens."""
        call = self._call()
        arguments = families.named_arguments(module, args, kwargs)
        if call is None or call.begun:
            call = self._calls.call = Call(module)
            call.towers, call.encoded = families.tags(arguments)
        call.begun = True
        given = arguments.get("attention_mask")
        call.mask = given if isinstance(given, Tensor) and given.dim() == 2 else None
        call.types = arguments.get("token_type_ids", arguments.get("mm_token_type_ids"))
        call.media = families.has_media(arguments)
        if call.media or self.named.active():
            call.packed = packing.find(arguments, self.language_model)
        borders = () if call.packed is None else tuple(call.packed.borders)
        if call.media:
            everything = self.images or self.decoder is not None
            call.visual = families.find_visual(self.family, module, arguments, everything, call.towers, borders)
        else:
            families.refuse_blind(self.family, module, arguments)
        if self.named.active():
            cache = arguments.get("past_key_values")
            state = caches.state_of(cache)
            start = caches.physical_length(cache) + (0 if state is None else state.dropped)
            named = self.named.find(module, arguments, start, borders)
            call.visual, call.media = named or call.visual, call.media or named is not None
        return self._base_mask(arguments) if self.family.base_masks else None

    def _base_mask(self, arguments: dict[str, Any]) -> Any:
        """A base that makes the masks of a later pass needs to know which columns the cache holds."""
        cache = arguments.get("past_key_values")
        state = caches.state_of(cache)
        if state is None or not state.reduced:
            return None
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        (batch, length), device = tokens.shape[:2], tokens.device
        past = caches.physical_length(cache)
        given = arguments.get("attention_mask")
        if given is not None and not (isinstance(given, Tensor) and given.dim() == 2) and not caches.is_static(cache):
            return None
        new = columns.new_columns(given, batch, length, past, cache, device)
        old = columns.past_columns(state, given, length, past, device)
        mask = columns.joined(old, new, batch, past, length, cache, device)
        return (), {**arguments, "attention_mask": None if mask is None else mask.long()}

    def post(self, module: nn.Module, *_: Any) -> None:
        """End of the call that ``module`` began, also after an exception."""
        call = self._call()
        if call is not None and call.owner is module:
            self._calls.call = None
        if self.decoder is not None:
            self.decoder.forget()

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
        call = self._call()
        if call is not None:
            call.encoded = [*call.encoded, span] if span is not None else call.encoded
        else:
            families.tag(output, Encoded(families.tower_inputs(module, args, kwargs), span))

    # ------------------------------------------------------------------ the language model
    def language_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reduce a prefill, or make a later pass fit the reduced cache."""
        if self.decoder is not None:
            # No hook runs at the end of a pass that KeyboardInterrupt ends.
            self.decoder.forget()
        call = self._call()
        arguments = families.named_arguments(module, args, kwargs)
        cache = arguments.get("past_key_values")
        state = caches.state_of(cache)
        if state is None and (call is None or not call.media):
            return None
        if call is None or (call.owner is module and module is not self.base):
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
        if self.decoder is not None:
            if call.tokens is not None:
                refusals.refuse_columns(call)
            changed = arguments if changed is None else changed
            labels = _candidates(call, changed["inputs_embeds"]) if call.labels is None else call.labels
            if labels is not None and call.labels is None and self.decoder.drop.compress:
                raise ValueError("expected a prompt alone with compress=True, got candidates of assisted decoding too")
            changed, call.run = self.decoder.begin(call.tokens, changed, cache, labels)
        call.forward = Span(embeds.device)
        return None if changed is None else ((), changed)

    def rotary_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On a rotary embedding: kept tokens turn by their original positions.

        The language model itself is given consecutive ones, in which neither masks nor flash-attention
        see the borders between packed rows that gaps look like.
        """
        call = self._call()
        if call is None or call.rotary is None:
            return None
        names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
        arguments = {**dict(zip(names, args)), **kwargs}
        given = arguments.get("position_ids")
        if given is None or given.shape[-1] != call.rotary.shape[-1]:
            raise ValueError(f"expected a rotary embedding of position_ids, got {type(module).__name__} without them")
        return (), {**arguments, "position_ids": call.rotary.to(given.device)}

    def language_post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The cache learns what the pass put into it."""
        call = self._call()
        if call is None:
            return
        call.rotary = None
        if call.record is None:
            return
        if call.forward is not None:
            call.record.add(call.stage, call.forward.stop())
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if call.state is not None and cache is not None:
            caches.bind(cache, call.state)
        if self.decoder is not None:
            stages = self.decoder.end(call.run, cache)
            # A later pass on a compressed cache drops nothing: what the prompt's did stays in the report.
            call.record.stages = call.record.stages if stages is None else stages
            for span in () if call.run is None else call.run.spans:
                call.record.add("select", span)
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
        real = columns.new_columns(self._plain(call, given, cache), batch, length, past, cache, device)
        if call.visual is not None:
            call.visual = families.without_newlines(self.base, call.visual, embeds)
        reducible = self._reducible(call.visual)
        plan, decide = self._decide(embeds, reducible)
        call.stage = "prefill"
        record = call.record = Record([] if reducible is None else reducible.units, plan, (batch, length), real)
        record.before(cache, past + dropped)
        if self.decoder is not None and call.visual is not None:
            seen = call.visual
            self._refuse_packed(call.packed, seen)
            call.tokens = Tokens.of(seen.columns.to(device), seen.units, seen.sizes, (batch, length), real)
        for span in call.encoded:
            record.add("vision", span)
        record.add("decide", decide)
        if plan is None or reducible is None:
            return self._continue(call, arguments, embeds, cache, state, record)
        if plan.is_gather and plan.num_out == plan.num_in and self.position == "keep":
            return self._continue(call, arguments, embeds, cache, state, record)
        refusals.refuse(arguments, call, length, self.family.positions == "mrope")
        self._refuse_packed(call.packed, reducible)
        move = Span(device)
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        visual = reducible.columns.to(device)
        rows = record.rows = plan.lift(visual, cu, real=real, dense=True)
        if rows.padded:
            self._refuse_padding()
        valid = rows.valid().view(batch, -1)
        width = valid.shape[1]
        old = columns.past_columns(state, given, length, past, device)
        mask = columns.joined(old, valid if rows.padded else None, batch, past, width, cache, device)
        changed = self._carry(arguments, rows, batch, length)
        changed["inputs_embeds"] = ops.plan_apply(rows, embeds)
        packed = call.packed = None if call.packed is None else call.packed.after(rows)
        # Always explicit: without a mask, gaps in positions would be read as borders between packed rows.
        full = torch.ones(batch, past + width, dtype=torch.long, device=device)
        remade = self.family.masks is not None
        if self.family.base_masks and not remade and not (isinstance(given, Tensor) and given.dim() == 2):
            changed["attention_mask"] = columns.gathered(given, rows, valid, past, caches.capacity(cache))
        else:
            changed["attention_mask"] = full if mask is None else mask.long()
        number = columns.consecutive(mask, batch, past, width, device)
        if packed is not None:
            number = packed.number()
            changed |= packed.lengths(changed)
            changed["attention_mask"] = None
        self._place(call, changed, rows, number, past + dropped, length)
        if remade:
            types = call.types
            if types is not None:
                (types,) = ops.position_remap(rows, types[:, -length:].to(device), dim=-1, fill=0)
                # Counted from the first column that the cache holds; what it holds asks nothing any more.
                types = torch.nn.functional.pad(types, (past, 0))
            changed["attention_mask"] = self.family.masks(self.base, changed, types)  # type: ignore[misc]
        if call.tokens is not None:
            call.tokens = call.tokens.after(rows)
        if arguments.get("visual_pos_masks") is not None:
            self._deepstack(changed, plan, rows, visual, real)
        if "cache_position" in changed:
            changed["cache_position"] = torch.arange(past, past + width, device=device)
        if call.labels is not None:
            columns.shorten(call.labels, rows, valid)
            if packed is not None:
                packed.part(call.labels)
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
        # Text alone follows: causal masks do, also where the base makes others for visual tokens.
        given = self._plain(call, arguments.get("attention_mask"), cache)
        new = columns.new_columns(given, batch, length, past, cache, device)
        old = columns.past_columns(state, given, length, past, device)
        mask = columns.joined(old, new, batch, past, length, cache, device)
        changed = dict(arguments)
        changed["attention_mask"] = None if mask is None else mask.long()
        position = arguments.get("position_ids")
        refusals.refuse_length(position, length)
        if self.family.positions == "mrope":
            shape: tuple[int, ...] = (
                3 if position is None or position.dim() == 2 else position.shape[0],
                batch,
                length,
            )
        else:
            shape = (batch, length)
        if self.position == "renumber":
            changed["position_ids"] = columns.consecutive(mask, batch, past, length, device).expand(shape)
        elif position is None and self.family.positions != "none":
            start = past + state.dropped
            changed["position_ids"] = torch.arange(start, start + length, device=device).expand(shape)
        if self.family.positions == "rope" and self.position == "keep":
            # As in the prefill: only the rotary embedding sees the gaps.
            call.rotary = changed["position_ids"].expand(shape)
            changed["position_ids"] = columns.consecutive(mask, batch, past, length, device)
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

    def _plain(self, call: Call, given: Any, cache: Any) -> Any:
        """The mask of real tokens: what the base was given, where it makes 4-D masks of it."""
        return call.mask if self.family.base_masks and not caches.is_static(cache) else given

    def _refuse_padding(self) -> None:
        """Raise where the model itself goes wrong with padded rows, which this pass would have."""
        config: Any = self.language_model.config
        found = sorted(set(getattr(config, "layer_types", None) or ()) & set(self.family.unpadded))
        if found:
            _check.fail(f"rows of one length for layers of type {found[0]}, which count padding as tokens", "padding")

    def _refuse_packed(self, packed: Packed | None, visual: Visual) -> None:
        """Raise for packed samples that this model does not keep apart."""
        if packed is None:
            return
        packed.check()
        packed.check_units(visual.columns, visual.sizes)
        packed.check_model(self.language_model, self.family.base_masks, self.family.text_positions)

    def _reducible(self, visual: Visual | None) -> Visual | None:
        """The units that the method acts on: images only when it asks for them."""
        if visual is None or self.method is None:
            return None
        keep = [i for i, unit in enumerate(visual.units) if self.images or unit.kind == "video"]
        if len(keep) == len(visual.units):
            return visual
        if not keep:
            return None
        parts = visual.columns.split(visual.sizes)
        return Visual(
            torch.cat([parts[i] for i in keep]), [visual.units[i] for i in keep], [visual.sizes[i] for i in keep]
        )

    @staticmethod
    def _carry(arguments: dict[str, Any], rows: Plan, batch: int, length: int) -> dict[str, Any]:
        """Everything that has an entry per token follows its anchor."""
        changed = dict(arguments)
        for name, value in arguments.items():
            if name in ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks"):
                continue
            if isinstance(value, Tensor) and value.dim() >= 2 and tuple(value.shape[:2]) == (batch, length):
                (changed[name],) = ops.position_remap(rows, value, dim=1)
        return changed

    def _place(self, call: Call, changed: dict[str, Any], rows: Plan, number: Tensor, start: int, length: int) -> None:
        """Put in the positions of a reduced prefill; ``start`` is the logical position of its first column."""
        position = changed.get("position_ids")
        if self.family.positions == "mrope":
            assert position is not None
            changed["position_ids"] = self._positions(position, rows, number)
            return
        if self.family.positions == "none" and position is None:
            return
        changed["position_ids"] = number
        if self.position == "keep" and self.family.positions == "rope":
            if position is None:
                position = torch.arange(start, start + length, device=number.device)[None]
            position = position.to(number.device).expand(number.shape[0], -1)
            (call.rotary,) = ops.position_remap(rows, position, dim=-1)

    def _positions(self, position: Tensor, rows: Plan, number: Tensor) -> Tensor:
        """M-RoPE positions of reduced rows."""
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
        given = changed["visual_pos_masks"].to(at.device)
        visual = given[..., 0] if given.dim() == 3 else given
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
        (kept,) = ops.position_remap(rows, visual, dim=-1, fill=0)
        changed["visual_pos_masks"] = kept[..., None] if given.dim() == 3 else kept


def _candidates(call: Call, embeds: Tensor) -> Tensor | None:
    """Labels that tell the prompt from the candidates of assisted decoding, which come in one pass with it."""
    count = 0 if call.tokens is None else generation.candidates()
    if not 0 < count < embeds.shape[1]:
        return None
    labels = torch.full(embeds.shape[:2], -100, device=embeds.device)
    labels[:, -count:] = 0
    return labels
