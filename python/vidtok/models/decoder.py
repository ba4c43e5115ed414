"""Drops inside the decoder: visual tokens leave at the entry of a layer, and every later layer follows."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check, ops
from vidtok.models import budgets, columns, compress, generation, layers, masks, scoring
from vidtok.models import cache as caches
from vidtok.models import packed as packing
from vidtok.models.cache import Stages
from vidtok.models.drop import Drop
from vidtok.models.following import Following, remembers
from vidtok.models.packed import Packed
from vidtok.models.report import Span, Stage
from vidtok.models.run import Run, Step
from vidtok.models.tokens import Tokens
from vidtok.models.unpacked import Unpacked

RUN = "vidtok_run"


class DecoderHook:
    """Pre-hooks on the decoder layers; what belongs to a pass lives in :class:`Run` or on its cache.

    Args:
        language_model: runs the layers.
        drop: what leaves where.
        position: ``keep``, or ``renumber`` to count the tokens that remain at each drop.
    """

    def __init__(self, language_model: nn.Module, drop: Drop, position: str = "keep") -> None:
        self.drop, self.position = drop, position
        self.layers = layers.Layers(language_model)
        drop.validate(len(self.layers.modules), self.layers.kinds)
        self.entries = drop.entries
        if drop.compress and position != "keep":
            _check.fail("position='keep' with compress=True, whose early layers keep rotated keys", repr(position))
        windows = [i for i, kind in enumerate(self.layers.kinds) if kind in ("sliding_attention", "chunked_attention")]
        if drop.compress and windows:
            raise ValueError(
                f"expected full attention in all layers with compress=True, got {self.layers.kinds[windows[0]]} "
                f"in layer {windows[0]}"
            )
        self.layers.check(self.entries)
        self.following = Following(self.layers, position)
        for scorer in drop.scorers:
            if scorer is not None:
                scoring.find_attention(self.layers.modules[scorer])
        self.asks = any(stage.kind == "attn" for stage in drop.stages)
        self.transv = self._transv(language_model)
        # A pass travels in the arguments of the layers, so that recomputation in a checkpoint meets its own.
        self.travels = self.layers.passes_arguments()
        self._local = threading.local()

    def _transv(self, language_model: nn.Module) -> Any:
        if self.drop.merge != "transv":
            return self.drop.merge
        from vidtok.models.transv import TransV

        return TransV(language_model, self.drop)

    def hooks(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """(module, ``"pre"``, function) of every hook."""
        return [(m, "pre", functools.partial(self.layer_pre, i)) for i, m in enumerate(self.layers.modules)]

    # ------------------------------------------------------------------ a pass of the language model
    def begin(
        self,
        tokens: Tokens | None,
        arguments: dict[str, Any],
        cache: Any,
        labels: Tensor | None = None,
    ) -> tuple[dict[str, Any], Run | None]:
        """Before the language model runs on ``inputs_embeds`` and the rest of ``arguments``.

        Args:
            tokens: the visual tokens among these columns; None when there are none.
            cache: filled by the passes before.
            labels: ``[B, L]`` of these columns; shortened in place at the end.

        Returns:
            The arguments to run with, and the pass, which is None when nothing has to be done.
        """
        self._local.run = None
        before = caches.state_of(cache)
        old = None if before is None else before.stages
        if tokens is not None and not tokens.units:
            tokens = None
        if tokens is None and old is None:
            return arguments, None
        self._refuse(tokens, arguments, cache, old)
        embeds = arguments["inputs_embeds"]
        run = Run(self.drop, tokens, old, embeds, caches.physical_length(cache), cache, labels)
        given = arguments.get("attention_mask")
        run.old = columns.past_columns(before, given, embeds.shape[1], run.past, embeds.device)
        if isinstance(given, Tensor) and given.dim() == 2:
            run.real = columns.new_columns(given, run.batch, run.length, run.past, cache, embeds.device)
        else:
            self._read_masks(run, given, embeds, tokens)
        packed = None if tokens is None or cache is not None else self._packed(arguments)
        keys, asking, text = self._budgets(tokens, labels, packed)
        run.enter(keys, asking, text, packed)
        position = arguments.get("position_ids")
        run.mrope = position.dim() == 3 if isinstance(position, Tensor) else self.layers.mrope
        self._local.run = run
        return ({**arguments, RUN: run} if self.travels else arguments), run

    def _windows(self, index: int) -> bool:
        """Whether a layer from ``index`` on sees so many columns only."""
        return any(kind in ("sliding_attention", "chunked_attention") for kind in self.layers.kinds[index:])

    def forget(self) -> None:
        """End of a call, also after an exception."""
        self._local.run = None

    def end(self, run: Run | None, cache: Any) -> list[Stage] | None:
        """After the language model ran: the cache learns what its layers hold, and labels are shortened.

        Returns:
            What the drops did, for the report.
        """
        self._local.run = None
        if run is None:
            return None
        if run.tokens is not None and len(run.steps) < len(self.entries):
            _check.fail(f"{len(self.layers.modules)} layers that run one after another", "a pass that left some out")
        last = run.last()
        if run.labels is not None and last.total is not None:
            columns.shorten(run.labels, last.total, last.valid)
            if last.packed is not None:
                last.packed.part(run.labels)
        if cache is not None and run.steps and self.drop.compress:
            compress.check(cache)
            compress.compress(cache, run)
            run.records = [replace(record, everywhere=True) for record in run.records]
        elif cache is not None and run.steps:
            dropped, held = [], []
            for s in range(len(self.entries)):
                step = run.at(s)
                dropped.append(run.past + run.length - step.past - step.width)
                held.append(step.mask)
            stages = Stages(self.entries, dropped, held, run.floor, run.records)
            if remembers(cache):
                stages.columns = [run.held(s) for s in range(len(self.entries))]
            caches.bind_stages(cache, stages)
        if not torch.is_grad_enabled():
            run.memo.clear()
        return run.records

    def _budgets(
        self, tokens: Tokens | None, labels: Tensor | None, packed: Packed | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The budget of each column, which columns ask, and which read what leaves."""
        if tokens is None:
            return None, None, None
        rows = None if packed is None else Unpacked(packed.sample)
        if rows is not None:
            labels = None if labels is None else rows.unpack(labels.to(tokens.unit.device), -100)
            unit, frame = rows.unpack(tokens.unit, -1), rows.unpack(tokens.frame, -1)
            group = None if tokens.group is None else rows.unpack(tokens.group, -1)
            tokens = Tokens(unit, frame, tokens.units, rows.valid, group)
        keys = budgets.keys(self.drop, tokens, tokens.group)
        asking = scoring.queries(self.drop, tokens, labels) if self.asks else None
        # A prompt may end in visual tokens: what asks, and what the next token is read from, stays.
        keys = keys.masked_fill(scoring.ends(tokens) if asking is None else scoring.ends(tokens) | asking, -1)
        text = None if self.transv is None else self.transv.text(tokens, labels)
        if rows is not None:
            keys = rows.pack(keys, -1)
            asking = None if asking is None else rows.pack(asking, 0)
            text = None if text is None else rows.pack(text, 0)
        return keys, asking, text

    def _refuse(self, tokens: Tokens | None, arguments: dict[str, Any], cache: Any, old: Stages | None) -> None:
        """Raise for passes that would go silently wrong."""
        if old is not None and old.entries != self.entries:
            _check.fail(f"a cache with drops before layers {list(self.entries)}", f"one with {list(old.entries)}")
        if caches.is_static(cache) and not masks.by_layer():
            raise ValueError(
                "expected a cache that grows, got a static one, whose layers share one length in this transformers"
            )
        if tokens is None:
            return
        if self.drop.compress:
            compress.check(cache)
        if (self.asks or self.drop.compress or self.transv is not None) and generation.in_chunks():
            raise ValueError(
                "expected the whole prompt in one pass for attn, compress and TransV, got prefill_chunk_size, by which "
                "what follows the visual tokens may come later"
            )
        if self.asks and caches.physical_length(cache):
            raise ValueError(
                "expected visual tokens in the first turn for attn, got a cache that is filled: "
                "scores would miss the tokens in it"
            )
        deep = arguments.get("deepstack_visual_embeds")
        if deep is not None and min(self.entries) < len(deep):
            _check.fail(
                f"drops at layer {len(deep)} or later, after the layers that visual features are added to",
                f"layer {min(self.entries)}",
            )

    def _packed(self, arguments: dict[str, Any]) -> Packed | None:
        """The samples of a packed row."""
        packed = packing.find(arguments, self.layers.owner)
        if packed is None:
            return None
        packed.check()
        packed.check_model(self.layers.owner)
        return packed

    def _read_masks(self, run: Run, given: Any, embeds: Tensor, tokens: Tokens | None) -> None:
        """Masks of four dimensions say which columns are real, and which see each other both ways."""
        run.real = None if tokens is None else tokens.valid
        if given is None:
            return
        static, length = caches.is_static(run.cache), run.length
        if tokens is None:
            if static:
                run.real = columns.new_columns(given, run.batch, length, run.past, run.cache, embeds.device)
                return
            for mask in given.values() if isinstance(given, dict) else (given,):
                if isinstance(mask, Tensor) and mask.dim() == 4:
                    new = masks.allowed(mask)[:, 0, -length:, -length:].diagonal(dim1=1, dim2=2)
                    run.real = None if bool(new.all()) else new
            return
        made = given if isinstance(given, dict) else dict.fromkeys(set(self.layers.kinds), given)
        real = columns.joined(run.old, run.real, run.batch, run.past, length, run.cache, embeds.device)
        for kind, mask in made.items():
            if kind not in layers.ATTENTION or not (isinstance(mask, Tensor) and mask.dim() == 4):
                continue
            first = masks.first_new(kind, run.past, mask.shape[-1], length, static)
            pairs = masks.blocks(mask, length, first)
            if pairs is not None:
                run.blocks[kind] = pairs
            if kind in self.layers.kinds:
                index = self.layers.kinds.index(kind)
                layer = None if run.cache is None or index >= len(run.cache.layers) else run.cache.layers[index]
                known = masks.build(self.layers.config, kind, embeds, real, run.past, layer)
                if not masks.same(masks.with_blocks(known, pairs, embeds, run.past, first), mask, run.real):
                    _check.fail(
                        "masks that are causal but for tokens that see each other both ways", f"others for {kind}"
                    )

    # ------------------------------------------------------------------ a layer
    def layer_pre(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before layer ``index``: drop what leaves here, and give the layer arguments for what is left."""
        run = kwargs.get(RUN)
        if run is None:
            run = getattr(self._local, "run", None)
            if run is None:
                return None
            if getattr(module, "gradient_checkpointing", False) and module.training:
                name = type(self.layers.owner).__name__
                _check.fail("a decoder that passes its arguments on to checkpointed layers", name)
        kwargs = dict(kwargs)
        kwargs.pop(RUN, None)
        if run.tokens is None:
            given = self.following.later(run, index, args, kwargs)
            if given is not None:
                return given
        hidden, arguments, positional = layers.named(module, args, kwargs)
        for s, entry in enumerate(self.entries):
            if entry == index and run.tokens is not None:
                hidden = self._leave(run, s, index, module, hidden, arguments)
        step = run.current(index)
        if step is not None:
            arguments = self.following.arguments(run, step, index, hidden, arguments)
        for s, scorer in enumerate(self.drop.scorers):
            if scorer == index and self.entries[s] > index and run.tokens is not None and s not in run.kept:
                position = scoring.positions_of(module, arguments)
                run.kept[s] = self._select(run, s, run.before(s), module, hidden, position)
        return layers.put(module, hidden, arguments, positional)

    def _leave(
        self, run: Run, s: int, index: int, module: nn.Module, hidden: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        step = run.steps.get(s)
        if step is None:
            span = Span(hidden.device)
            before = run.before(s)
            kept = run.kept.get(s)
            if kept is None:
                position = scoring.positions_of(module, arguments)
                if self.drop.stages[s].kind == "attn" and before.stage >= 0:
                    position = scoring.positions_of(
                        module, self.following.arguments(run, before, index, hidden, arguments)
                    )
                kept = self._select(run, s, before, module, hidden, position)
            step = run.leave(s, before, kept)
            if step.past and step.valid is not None and before.valid is None and self._windows(index):
                raise ValueError(
                    "expected a later turn whose rows lose as many tokens each, because windows count padding, "
                    f"got {kept.dropped}"
                )
            if step.rows is not None:
                run.records.append(Stage(self.entries[s], self.drop.stages[s].kind, step.rows, run.tokens_of(before)))
            run.spans.append(span.stop())
        if step.rows is None:
            return hidden
        if step.readers is not None:
            hidden = self._pass_on(s, hidden, run.before(s).packed, *(mask.to(hidden.device) for mask in step.readers))
        rows = run.on(step.rows, hidden.device)
        left = [ops.plan_apply(rows, stream) for stream in layers.streams(module, hidden)]
        if len(left) == 1 and not hasattr(module, "altup"):
            return left[0].unflatten(2, hidden.shape[2:])
        return torch.stack(left)

    def _pass_on(self, s: int, hidden: Tensor, packed: Packed | None, dropped: Tensor, text: Tensor) -> Tensor:
        """What leaves, to the text of its own row or packed sample."""
        if packed is None:
            return self.transv(s, hidden, dropped, text)  # type: ignore[no-any-return]
        return torch.cat([self.transv(s, hidden[:, i], dropped[:, i], text[:, i]) for i in packed.parts()], 1)

    def _select(self, run: Run, s: int, before: Step, module: nn.Module, hidden: Tensor, position: Any) -> budgets.Kept:
        assert before.key is not None
        if before.packed is not None and self.drop.stages[s].kind == "attn":
            return self._select_packed(run, s, before, module, hidden, position)
        with torch.no_grad():
            return scoring.select(
                self.drop,
                s,
                before.key,
                run.original,
                layer=module,
                hidden=hidden,
                position_embeddings=position,
                valid=before.valid,
                asking=before.asking,
            )

    @torch.no_grad()
    def _select_packed(
        self, run: Run, s: int, before: Step, module: nn.Module, hidden: Tensor, position: Any
    ) -> budgets.Kept:
        """Each packed sample asks for itself: no other is looked at, nor padded to the longest."""
        assert before.packed is not None and before.key is not None and before.asking is not None
        masks_kept, dropped = [], 0
        for part in before.packed.parts():
            kept = scoring.select(
                self.drop,
                s,
                before.key[:, part],
                run.original,
                layer=module,
                hidden=hidden[:, part],
                position_embeddings=scoring.positions_in(position, part),
                asking=before.asking[:, part],
            )
            masks_kept.append(kept.mask)
            dropped += kept.dropped[0]
        return budgets.Kept(torch.cat(masks_kept, 1), [dropped])
