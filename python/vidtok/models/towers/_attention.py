"""transformers' attention functions, with keys that weigh by size.

An attention module asks its config which function to call. While tokens merge, the config that it asks
is a :class:`SizedConfig`, which names a function registered here; that one lets the step of the pass
see the keys, adds the logarithm of the sizes, and calls the function that the model was set to.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vidtok.merge.attention import compiled, serves
from vidtok.merge.run import Step

try:
    from transformers import AttentionInterface
except ImportError:
    from transformers.modeling_utils import AttentionInterface

_PREFIX = "vidtok_"


def _itself(config: Any) -> Any:
    return config


class SizedConfig:
    """A model's config with another name for its attention function; everything else is the config's own.

    It stays with its module: copies and pickles of the module get the config.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.step: Step | None = None
        #: Whether the function that the model was set to runs, which may ask for its own name.
        self.inside = False
        #: Whether the eager function takes its mask for a factor of the weights.
        self.factor = False

    @property
    def _attn_implementation(self) -> str:
        own = self.config._attn_implementation
        return own if self.inside else register(own or "eager")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.config, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.config,)


class _Name(str):
    """The name of a flash attention with sizes, which is found by its own name and equals that of the other as well."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or (isinstance(other, str) and str.__eq__(self, _PREFIX + other))

    def __ne__(self, other: object) -> bool:
        return not self == other


def register(implementation: str) -> str:
    """The name of ``implementation`` with sizes, which is there from now on."""
    name = _PREFIX + implementation
    # Compiled code cannot look into a registry whose keys hash in a way of their own.
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, sized_attention)
    # Towers of transformers 4 compare the name with "flash_attention_2".
    return _Name(name) if "flash" in implementation else name


def _base(module: Any, implementation: str) -> Callable[..., Any]:
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    kind = next(
        kind for kind in type(module).__mro__ if hasattr(sys.modules[kind.__module__], "eager_attention_forward")
    )
    return sys.modules[kind.__module__].eager_attention_forward


def sized_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function behind every name that :func:`register` gives."""
    config = module.config
    implementation = config.config._attn_implementation or "eager"
    base = _base(module, implementation)

    def function(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        config.inside = True
        try:
            return base(*args, **options)
        finally:
            config.inside = False

    if config.step is None:
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    weights: list[Any] = []
    fused = implementation == "sdpa" and attention_mask is None and not kwargs.get("dropout")
    fused = fused and kwargs.get("softcap") is None and kwargs.get("position_bias") is None

    fused = fused and config.step.free and base is sdpa_attention_forward
    # What transformers asks where there is no mask.
    causal = kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if fused and (mask is not None or not causal) and serves(q, k, v, mask):
            weights.append(None)
            return compiled(q, k, v, mask, scale)
        out, weight = function(module, q, k, v, mask, scaling=scale, **kwargs)
        weights.append(weight)
        return out.transpose(1, 2)

    out = config.step.attention(
        query, key, value, mask=attention_mask, scale=scaling, attend=attend,
        flash="flash" in implementation or (implementation == "eager" and config.factor),
    )  # fmt: skip
    return out.transpose(1, 2), weights[0]


def _is_factor(attention: Any) -> bool:
    # Eager functions of transformers 4 multiply by a mask of heads.
    try:
        function = _base(attention, "eager")
    except StopIteration:
        return False
    one = torch.ones(1, 1, 1, 1)
    return not function(attention, one, one, one, torch.zeros_like(one), scaling=1.0)[0].any()


def take(attention: Any) -> Callable[[], None]:
    """Let an attention module ask a :class:`SizedConfig`; the result takes that back."""
    own = attention.config
    sized = SizedConfig(own)
    sized.factor = _is_factor(attention)
    attention.config = sized

    def back() -> None:
        if attention.config is sized:
            attention.config = own

    return back


def call(attention: Any, step: Step, *args: Any, through: Any = None, **kwargs: Any) -> Any:
    """Call an attention module, or the one ``through`` which it is called, as part of ``step``."""
    config = attention.config
    config.step = step
    try:
        return (attention if through is None else through)(*args, **kwargs)
    finally:
        config.step = None
