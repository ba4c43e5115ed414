"""Samples that lie one behind another in one row, told apart by positions that restart or by ``cu_seq_lens``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vidtok import ops
from vidtok.models.layers import Layers
from vidtok.plan import Plan

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
#: Arguments of flash attention that count the tokens of samples.
LENGTHS = (*BORDERS, *LONGEST)


@dataclass(frozen=True)
class Packed:
    """The samples of a row.

    Args:
        borders: first column of each sample, and the columns of the row.
        sample: int64 ``[1, L]``, number of each column's sample.
        refusal: what is wrong with them, for :meth:`check`; empty for nothing.
        counted: whether flash attention is given all it needs to tell samples apart without positions.
    """

    borders: list[int]
    sample: Tensor
    refusal: str = ""
    counted: bool = False

    @classmethod
    def of(cls, borders: Sequence[int], device: torch.device, refusal: str = "", counted: bool = False) -> Packed:
        """Samples with these borders."""
        sizes = torch.tensor(borders).diff()
        sample = torch.repeat_interleave(torch.arange(sizes.shape[0]), sizes)[None].to(device)
        return cls(list(borders), sample, refusal, counted)

    def check(self) -> None:
        """Raise for samples that cannot be reduced."""
        if self.refusal:
            raise ValueError(self.refusal)

    def check_units(self, columns: Tensor, sizes: Sequence[int]) -> None:
        """Raise for a video or image that does not end within its sample."""
        first = self.sample.reshape(-1)[columns.to(self.sample.device)]
        for part in first.split(list(sizes)):
            if part.numel() and bool((part != part[0]).any()):
                raise ValueError("expected visual tokens that end within their packed sample, got some that go on")

    def check_model(self, language_model: Any, base_masks: bool = False, text_positions: bool = True) -> None:
        """Raise for a model that does not keep samples apart.

        Args:
            language_model: that runs on them.
            base_masks: whether the model around it makes the masks.
            text_positions: whether it gives text positions to flash attention.
        """
        name = type(language_model).__name__
        if base_masks:
            raise ValueError(f"expected padded rows for {name}, whose masks do not part samples, got packed ones")
        if "linear_attention" in Layers(language_model).kinds:
            raise ValueError(f"expected padded rows for {name}, which has recurrent layers, got packed samples")
        if not (text_positions or self.counted) and _flash(language_model):
            raise ValueError(
                f"expected cu_seq_lens and max_length with the flash attention of {name}, which is given no text "
                "positions, got packed samples without them"
            )

    def number(self) -> Tensor:
        """int64 ``[1, L]``: columns counted from 0 in each sample, as masks and flash attention tell samples apart."""
        return self._number

    @cached_property
    def _number(self) -> Tensor:
        # Once for all layers: the borders come from the host.
        start = torch.tensor(self.borders, device=self.sample.device)
        return torch.arange(self.sample.shape[1], device=self.sample.device)[None] - start[self.sample]

    def after(self, rows: Plan) -> Packed:
        """The samples of a row that a plan made from this one."""
        (sample,) = ops.position_remap(rows, self.sample.to(rows.device), dim=-1)
        count = torch.bincount(sample[0], minlength=len(self.borders) - 1)
        return Packed([0, *count.cumsum(0).tolist()], sample, self.refusal, self.counted)

    def parts(self) -> list[slice]:
        """The columns of each sample that has any."""
        return [slice(a, b) for a, b in zip(self.borders, self.borders[1:]) if b > a]

    def lengths(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments that count the tokens of samples, counted again."""
        return {name: self.length(name, arguments[name]) for name in LENGTHS if arguments.get(name) is not None}

    def length(self, name: str, value: Any) -> Any:
        """One such argument, of the type that ``value`` has."""
        longest = max(b - a for a, b in zip(self.borders, self.borders[1:]))
        if not isinstance(value, Tensor):
            return longest
        key = (name in BORDERS, value.dtype, value.device)
        if key not in self._made:
            given = self.borders if name in BORDERS else longest
            self._made[key] = torch.tensor(given, dtype=value.dtype, device=value.device)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[Any, Tensor]:
        return {}

    def part(self, labels: Tensor) -> None:
        """Take the labels, in place, that the last token of another sample would have to predict."""
        first = sorted({b for b in self.borders[:-1] if b < labels.shape[1]})
        labels[:, torch.tensor(first, device=labels.device)] = -100


def find(arguments: dict[str, Any], language_model: Any) -> Packed | None:
    """The samples of a forward call, None for padded rows.

    Samples begin where the text positions are 0 (of 4 rows of M-RoPE positions, row 0 is the text's), as
    ``find_packed_sequence_indices`` and ``_is_packed_sequence`` of transformers see them, or at ``cu_seq_lens_q``.
    As there, neither counts beside a mask or a filled cache.

    Args:
        arguments: of the model, by name.
        language_model: that runs on them.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    (batch, length), device = tokens.shape[:2], tokens.device
    given = [arguments[name] for name in BORDERS if arguments.get(name) is not None]
    if arguments.get("attention_mask") is not None or arguments.get("past_key_values") is not None:
        if not given:
            return None
        return Packed.of([0, length], device, "expected cu_seq_lens without attention_mask and cache, got one of them")
    text = _text(arguments.get("position_ids"), batch, length)
    starts = None if text is None else _starts(text)
    if starts is None and not given:
        return None
    borders, refusal = [0, length], ""
    counted = all(arguments.get(name) is not None for name in LENGTHS)
    if batch != 1:
        refusal = f"expected one row of packed samples, got {batch} rows"
    elif _caches(arguments, language_model):
        refusal = "expected use_cache=False with packed samples, got a cache, with which no mask parts them"
    elif starts is not None and text is not None and bool((text[0, starts] != 0).any()):
        refusal = "expected position_ids that count from 0 in each packed sample, got others"
    elif given:
        borders = given[0].tolist()
        ascending = borders[:1] == [0] and borders[-1] == length and borders == sorted(borders)
        if not ascending or any(value.tolist() != borders for value in given):
            refusal, borders = f"expected cu_seq_lens from 0 to the {length} tokens of the row, got others", [0, length]
        elif starts is None and len(borders) > 2 and not (counted and _flash(language_model)):
            refusal = (
                "expected position_ids that restart at each packed sample, or all of cu_seq_lens and max_length with "
                "flash attention, got cu_seq_lens that attention does not read"
            )
        elif starts is not None and starts.tolist() != sorted(set(borders[:-1])):
            refusal = "expected position_ids that restart at cu_seq_lens, got others"
    elif starts is not None:
        borders = [*starts.tolist(), length]
    return Packed.of(borders, device, refusal, counted)


def _flash(language_model: Any) -> bool:
    return "flash" in str(getattr(language_model.config, "_attn_implementation", ""))


def _text(position: Any, batch: int, length: int) -> Tensor | None:
    """The row of positions by which transformers tells samples apart."""
    if not isinstance(position, Tensor) or position.shape[-1] != length:
        return None
    if position.dim() == 3:
        return position[0] if position.shape[0] == 4 else None
    return position if position.dim() == 2 else None


def _starts(text: Tensor) -> Tensor | None:
    """Columns at which samples begin, None when there is one in each row."""
    jump = text.diff(dim=-1) != 1
    if not bool((jump & ((text[:, 1:] == 0) | (text.diff(dim=-1) < 0))).any()):
        return None
    return torch.nn.functional.pad(jump[0], (1, 0), value=True).nonzero().squeeze(1)


def _caches(arguments: dict[str, Any], language_model: Any) -> bool:
    """Whether the language model will make a cache."""
    use = arguments.get("use_cache")
    if use is None:
        use = getattr(language_model.config, "use_cache", False)
    checkpointed = language_model.training and getattr(language_model, "gradient_checkpointing", False)
    return bool(use) and not checkpointed
