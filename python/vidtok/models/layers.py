"""The decoder layers of a language model: where they are, of which kind, and which of their arguments are per token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache as memo
from typing import Any

import torch
from torch import Tensor, nn

from vidtok import _check, ops
from vidtok.plan import Plan

_WITHIN = ("model", "language_model", "decoder", "transformer", "backbone")
_LISTS = ("layers", "h", "blocks")
_KINDS = {
    "attention": "full_attention",
    "full": "full_attention",
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    "recurrent": "linear_attention",
    "qwen_sparse_attention": "indexed_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "conv": "linear_attention",
    "mlp": "none",
    "moe": "none",
}
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
OTHERS = ("indexed_attention", "linear_attention", "none")
# What some layers take for every token beside their hidden states.
PER_TOKEN = frozenset(
    {
        "per_layer_input",
        "per_layer_inputs",
        "moe_mm_token_type_ids",
        "token_type_ids",
        "mm_token_type_ids",
        "input_ids",
        "labels",
        "seq_idx",
    }
)
MASKS = ("attention_mask", "causal_mask")
# Real columns of this pass, for what is recurrent in a layer.
LOCAL_MASKS = ("conv_mask",)
# What a layer hands on to the next ones: numbers of keys of its own.
HANDED_ON = ("prev_topk_indices",)
PADDED_WITH_EOS = ("ple_input_ids",)
# What layers only hand on: the loss's labels, and keys that later layers share (drops come before those, see check()).
UNTOUCHED = ("labels", "shared_kv_states")


class Layers:
    """The decoder layers of ``language_model``.

    Args:
        owner: the module whose forward runs the layers one after another.
        modules: the layers.
        kinds: ``full_attention``, ``sliding_attention``, ``chunked_attention``, ``linear_attention``
            (everything recurrent), ``indexed_attention`` (full, to keys that an index picks), ``none``
            (nothing that looks at other tokens) or the model's own word.
    """

    def __init__(self, language_model: nn.Module) -> None:
        self.owner, self.modules = _find(language_model)
        self.config: Any = self.owner.config
        self.kinds = [_kind(self.config, layer, i) for i, layer in enumerate(self.modules)]
        self.rotary = getattr(self.owner, "rotary_emb", None)
        self.mrope = "mrope_section" in str(getattr(self.config, "rope_parameters", None)) or "mrope_section" in str(
            getattr(self.config, "rope_scaling", None)
        )

    def passes_arguments(self) -> bool:
        """Whether what the language model is given beside its own arguments reaches the layers."""
        parameters = inspect.signature(type(self.owner).forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters)

    def check(self, entries: tuple[int, ...]) -> None:
        """Refuse drops that the layers cannot follow."""
        for entry in entries:
            for i in range(entry, len(self.modules)):
                if self.kinds[i] not in (*ATTENTION, *OTHERS):
                    _check.fail(f"a known kind of layer from layer {entry} on", f"{self.kinds[i]} at layer {i}")
            index = next((i for i in range(entry, len(self.modules)) if self.kinds[i] == "indexed_attention"), None)
            own = getattr(self.config, "indexer_types", None)
            if index is not None and own and own[index] == "shared":
                _check.fail(
                    f"drops before a layer that indexes its keys itself, or after layer {index}", f"layer {entry}"
                )
        shared = int(getattr(self.config, "num_kv_shared_layers", 0) or 0)
        first = len(self.modules) - shared
        if shared:
            last = {kind: i for i, kind in enumerate(self.kinds[:first])}
            source = min(last.values())
            for entry in entries:
                if entry > source:
                    _check.fail(
                        f"drops at layer {source} or before, whose keys layers from {first} on read too",
                        f"layer {entry}",
                    )


def _find(module: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    for name in _LISTS:
        found = getattr(module, name, None)
        if isinstance(found, nn.ModuleList) and len(found) and hasattr(module, "config"):
            count = getattr(module.config, "num_hidden_layers", None) or len(found)
            return module, [_unwrapped(layer) for layer in found][: int(count)]
    for name in _WITHIN:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _find(inner)
    _check.fail("a language model with a list of decoder layers", type(module).__name__)
    raise AssertionError


def _unwrapped(layer: Any) -> nn.Module:
    """The layer inside FSDP, a checkpoint wrapper or torch.compile, where parameters are whole and arguments named."""
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"):
        inner = getattr(layer, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return layer


def _kind(config: Any, layer: nn.Module, index: int) -> str:
    kind = getattr(layer, "block_type", None) or getattr(layer, "layer_type", None)
    if not isinstance(kind, str):
        types = getattr(config, "layer_types", None)
        kind = types[index] if types else getattr(layer, "attention_type", None)
    if not isinstance(kind, str):
        if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        else:
            kind = "full_attention"
    return _KINDS.get(kind, kind)


@memo
def _names(forward: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def named(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any], int]:
    """Hidden states, the other arguments of a layer's call by name, and how many came by position."""
    names = _names(type(layer).forward)
    if not args:
        arguments = dict(kwargs)
        return arguments.pop(names[0]), arguments, 0
    if len(args) > len(names):
        _check.fail(f"at most {len(names)} positional arguments of a decoder layer", str(len(args)))
    return args[0], {**dict(zip(names[1:], args[1:])), **kwargs}, len(args)


def put(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], positional: int) -> Any:
    """What a forward pre-hook returns: what came by position goes on by position.

    Hidden-state capture reads the hidden states there, and a reentrant checkpoint gradients.
    """
    names = _names(type(layer).forward)
    if not positional:
        return (), {names[0]: hidden, **arguments}
    front = names[1:positional]
    return (hidden, *(arguments[n] for n in front)), {n: v for n, v in arguments.items() if n not in front}


def streams(layer: nn.Module, hidden: Tensor) -> list[Tensor]:
    """``[B, L, C]`` of each residual stream that a layer is given, where they lie in a first dimension of their own."""
    return list(hidden) if hasattr(layer, "altup") else [hidden.flatten(2)]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def take(rows: Plan, value: Any, dim: int, fill: float = 0) -> Any:
    """Entries of the kept columns, of a tensor ``[..., B | 1, L, ...]`` with L at ``dim``, or of each one inside."""
    if isinstance(value, (tuple, list)):
        return type(value)(take(rows, item, dim, fill) for item in value)
    if isinstance(value, dict):
        return {key: take(rows, item, dim, fill) for key, item in value.items()}
    if value is None:
        return None
    batch = rows.num_sequences
    plan = rows if value.device == rows.device else rows.to(value.device)
    if value.is_complex():
        return torch.view_as_complex(take(plan, torch.view_as_real(value), dim - 1, fill).contiguous())
    at = dim % value.dim()
    if at == 0:
        _check.fail("a per-token argument with a batch dimension", str(list(value.shape)))
    if value.shape[at - 1] == 1 and batch > 1:
        value = value.expand(*value.shape[: at - 1], batch, *value.shape[at:])
    return ops.position_remap(plan, value, dim=dim, fill=fill)[0]


def follow(name: str, value: Any, rows: Plan, length: int) -> Any:
    """One argument of a layer, for the kept columns of rows that had ``length``.

    Raises:
        ValueError: an argument that seems to be per token and is not known.
    """
    if name in UNTOUCHED:
        return value
    if name.startswith("position_embeddings"):
        return take(rows, value, -2)
    if name == "freqs_cis":
        return take(rows, value, -2 if isinstance(value, Tensor) else -3)
    if not any(length in t.shape for t in tensors(value)):
        return value
    if name in PER_TOKEN and isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length:
        return take(rows, value, 1)
    shapes = [list(t.shape) for t in tensors(value)]
    _check.fail(f"known arguments of a decoder layer for the {length} tokens of a pass", f"{name} of shape {shapes[0]}")
