"""A stand-in for the package flash-attn on the CPU: dense and varlen attention, computed by SDPA per sequence.

``installed()`` puts it where transformers looks, so that ``attn_implementation="flash_attention_2"`` runs in fp32
through transformers' own code: how it reads masks, when it takes rows for packed ones, what it hands over as
``cu_seqlens``. It is strict about what the real kernels are strict about, and undefined where they are.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "2.8.3"

#: What was called since the last ``calls.clear()``: (function, sequences, causal).
calls: list[tuple[str, int, bool]] = []


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """One sequence: q ``[Lq, H, D]``, k and v ``[Lk, Hkv, D]``; causality is aligned at the bottom right."""
    if not q.shape[0] or not k.shape[0]:
        return torch.zeros_like(q)
    repeats = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1)
    k, v = (x.transpose(0, 1).repeat_interleave(repeats, 0) for x in (k, v))
    left, right = window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    column = torch.arange(k.shape[1])[None]
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if right >= 0:
        seen &= column <= at + right
    if left >= 0:
        seen &= column >= at - left
    blind = ~seen.any(-1)
    seen = seen | blind[:, None]
    if softcap:
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = ((softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf")).softmax(-1)) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.masked_fill(blind[:, None], 0).transpose(0, 1)


def _check(q: Tensor, k: Tensor, v: Tensor, dropout: float, alibi: Any) -> None:
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256, "one head dimension, at most 256"
    assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0, "query heads are a multiple of key heads"
    assert q.dtype == k.dtype == v.dtype, "one dtype"
    assert dropout == 0 and alibi is None, "dropout and alibi are not in the stand-in"


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """Rows of one length: q ``[B, Lq, H, D]``, k and v ``[B, Lk, Hkv, D]``; every column is real."""
    _check(q, k, v, dropout_p, alibi_slopes)
    calls.append(("dense", q.shape[0], causal))
    options = (softmax_scale, causal, tuple(window_size), softcap)
    return torch.stack([_attend(*row, *options) for row in zip(q, k, v)])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """Sequences behind one another: q ``[Tq, H, D]``, k and v ``[Tk, Hkv, D]``, borders in ``cu_seqlens``."""
    _check(q, k, v, dropout_p, alibi_slopes)
    assert block_table is None, "paged caches are not in the stand-in"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cu_seqlens are int32"
    assert cu_seqlens_q.shape == cu_seqlens_k.shape, "as many sequences of queries as of keys"
    borders = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    for cu, total, longest in zip(borders, (q.shape[0], k.shape[0]), (max_seqlen_q, max_seqlen_k)):
        # The kernels compute nothing past the given maximum, and read other memory past the end.
        sizes = [b - a for a, b in zip(cu, cu[1:])]
        assert cu[0] == 0 and cu[-1] <= total, f"cu_seqlens from 0 to at most {total}, not {cu}"
        assert min(sizes) >= 0 and max(sizes) <= int(longest), f"sequences of at most {longest}, not {sizes}"
    calls.append(("varlen", len(borders[0]) - 1, causal))
    options = (softmax_scale, causal, tuple(window_size), softcap)
    # What no sequence covers is neither computed nor, among the keys, seen; nobody checks that all is covered.
    out = torch.full_like(q, float("nan"))
    for (a, b), (c, d) in zip(*[zip(cu, cu[1:]) for cu in borders]):
        out[a:b] = _attend(q[a:b], k[c:d], v[c:d], *options)
    return out


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    """Paged attention, which only continuous batching calls."""
    raise AssertionError("expected no paged attention in these tests")


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``x``."""
    return x[indices]


def unpad_input(
    x: Tensor, mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Real tokens of ``x [B, L, ...]`` behind one another; their indices, borders, longest row and counts."""
    every = mask if unused_mask is None else mask + unused_mask
    sizes = every.sum(-1, dtype=torch.int32)
    indices = every.flatten().nonzero().flatten()
    cu = F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu, int(sizes.max()), mask.sum(-1, dtype=torch.int32)


def pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of :func:`unpad_input`; padding is zero."""
    out = x.new_zeros(batch * length, *x.shape[1:])
    out[indices] = x
    return out.view(batch, length, *x.shape[1:])


def _package() -> dict[str, types.ModuleType]:
    made = {}
    for name, functions in (
        ("flash_attn", (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)),
        ("flash_attn.flash_attn_interface", (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)),
        ("flash_attn.bert_padding", (index_first_axis, pad_input, unpad_input)),
    ):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "flash_attn")
        module.__version__ = VERSION  # type: ignore[attr-defined]
        for function in functions:
            setattr(module, function.__name__, function)
        made[name] = module
    made["flash_attn"].__path__ = []
    made["flash_attn"].bert_padding = made["flash_attn.bert_padding"]  # type: ignore[attr-defined]
    return made


def _available(*args: Any, **kwargs: Any) -> bool:
    return True


def _can_dispatch(self: Any, *args: Any, **kwargs: Any) -> bool:
    """transformers' check without its question for a GPU; models that do not know flash attention stay refused."""
    if not (self._supports_flash_attn or getattr(self, "_supports_flash_attn_2", False)):
        raise ValueError(f"{type(self).__name__} does not support Flash Attention")
    return True


_LOADED = (
    "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
    "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
)  # fmt: skip


@contextmanager
def installed() -> Iterator[list[tuple[str, int, bool]]]:
    """``flash_attention_2`` on the CPU inside the block; yields the record of calls. Everything is put back."""
    from transformers import PreTrainedModel
    from transformers import modeling_flash_attention_utils as utils

    undo: list[Any] = []

    def put(place: Any, name: str, value: Any) -> None:
        mapping = isinstance(place, dict)
        had = name in place if mapping else hasattr(place, name)
        before = (place[name] if mapping else getattr(place, name)) if had else None
        (place.__setitem__ if mapping else lambda n, v: setattr(place, n, v))(name, value)
        if had:
            undo.append(lambda: place.__setitem__(name, before) if mapping else setattr(place, name, before))
        else:
            undo.append(lambda: place.pop(name, None) if mapping else delattr(place, name))

    try:
        for name, module in _package().items():
            put(sys.modules, name, module)
        # Looked up by name in every module that imported it.
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "transformers" and "is_flash_attn_2_available" in getattr(module, "__dict__", ()):
                put(module, "is_flash_attn_2_available", _available)
        for name in ("_flash_attn_can_dispatch", "_flash_attn_2_can_dispatch"):
            if hasattr(PreTrainedModel, name):
                put(PreTrainedModel, name, _can_dispatch)
        matrix = getattr(utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", None)
        if matrix is not None:
            put(matrix[2], "general_availability_check", _available)
        for name in _LOADED:
            if hasattr(utils, name):
                put(utils, name, None)
        calls.clear()
        yield calls
    finally:
        for back in reversed(undo):
            back()
        calls.clear()
