"""Token merging in towers that vidtok does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.attach import Merging
from vidtok.merge.block import Halves
from vidtok.merge.frames import kind_of
from vidtok.merge.options import ToMe
from vidtok.merge.spec import resolve

_NAMES = ("attend", "feed")


class _Functions:
    """Two functions as :class:`vidtok.merge.Halves`."""

    def __init__(self, attend: Callable[..., Tensor], feed: Callable[..., Tensor]) -> None:
        self.attend, self.feed = attend, feed


def _halves(given: Any) -> Halves:
    if isinstance(given, tuple | list):
        if len(given) != 2 or not all(map(callable, given)):
            _check.fail("halves as two functions, (attend, feed)", repr(given)[:60])
        return cast(Halves, _Functions(*given))
    missing = [name for name in _NAMES if not callable(getattr(given, name, None))]
    if missing or isinstance(given, type):
        got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        _check.fail(
            "halves as an object with the methods attend and feed or as two functions, (attend, feed)",
            got + (f" without {' and '.join(missing)}" if missing else "; give an instance"),
        )
    return cast(Halves, given)


def _blocks(module: nn.Module, given: Any) -> list[nn.Module]:
    kind = type(module).__name__
    found: Any = given
    if isinstance(given, str):
        found = module
        for name in given.split("."):
            if not hasattr(found, name):
                children = [child for child, _ in module.named_children()]
                _check.fail(
                    f"{kind} to have blocks at {given!r}",
                    f"no {name!r} in {type(found).__name__}; {kind} has {', '.join(children) or 'no modules'}",
                )
            found = getattr(found, name)
    where = f"at {given!r}" if isinstance(given, str) else "in blocks="
    # A block that has children of its own is no list of them.
    listed = not isinstance(found, nn.Module) or isinstance(found, nn.ModuleList | nn.Sequential)
    if not listed or not isinstance(found, Sequence | nn.ModuleList | nn.Sequential):
        _check.fail(f"a list of the blocks of {kind} {where}", type(found).__name__)
    blocks = list(found)
    if not blocks:
        _check.fail(f"{kind} to have blocks {where}", "an empty list")
    for i, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            _check.fail(f"modules as the blocks of {kind}", f"{type(block).__name__} at {i}")
    inside = set(map(id, module.modules()))
    outside = next((i for i, block in enumerate(blocks) if id(block) not in inside), None)
    if outside is not None:
        _check.fail(f"blocks of {kind}", f"at {outside} a {type(blocks[outside]).__name__} that is not inside it")
    return blocks


def attach_any(
    module: nn.Module,
    merge: str | ToMe,
    *,
    blocks: str | Sequence[nn.Module] = "blocks",
    halves: Halves | tuple[Callable[..., Tensor], Callable[..., Tensor]],
    protected: int | Tensor = 1,
    full_length: bool = False,
) -> Merging:
    r"""Merge tokens in a tower that vidtok does not know, between the two halves of its blocks.

    Of a block ``x = x + attention(norm1(x))``, ``x = x + mlp(norm2(x))`` the halves are these two lines, with
    :math:`softmax(q k^T scale + \log size) v` for the attention itself. The blocks run in order, all of them in
    every pass, each with the tokens ``[B, T, C]`` as its first argument; later blocks get fewer.

    Args:
        module: the tower.
        merge: ``"tome:r=8"`` or a :class:`vidtok.merge.ToMe`.
        blocks: its blocks in order, or the dotted name of the list that holds them.
        halves: ``attend(block, x, step, *args, **kwargs)`` and ``feed(block, x)``, as an object with these
            methods or as two functions: the attention half and the MLP half, residuals added. ``attend`` calls
            ``step.attention(q, k, v)`` with ``[B, H, T, D]`` in place of ``scaled_dot_product_attention``;
            ``args`` and ``kwargs`` are the block's own.
        protected: tokens at the start of a sequence that never merge; or bool ``[T]`` or ``[B, T]``.
        full_length: whether every token is given back after the last block, merged ones as copies.

    Returns:
        A :class:`Merging`: ``restore()``, ``size``, ``trace()``, ``unmerge()``; also a context manager.

    Raises:
        ValueError: a module without these blocks, halves without these methods, options that do not fit. While
            it runs: an attention half that does not call ``step.attention``, blocks out of order.

    A mean over tokens behind the blocks weighs by size with ``vidtok.merge.weighted_mean(x, merging.size)``. A
    checkpoint of the user's own (``torch.utils.checkpoint``) begins with a block or with the whole tower.

    Source: Bolya et al., Token Merging, ICLR 2023, §3.

    Example:
        >>> def attend(block, x, step):
        ...     q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, 4, -1)).transpose(1, 3).unbind(2)
        ...     return x + block.proj(step.attention(q, k, v).transpose(1, 2).flatten(2))
        >>> def feed(block, x):
        ...     return x + block.mlp(block.norm2(x))
        >>> merging = attach_any(vit, "tome:r=8", halves=(attend, feed))  # doctest: +SKIP
    """
    own = _halves(halves)
    options = resolve(merge)
    prefix = 0
    if isinstance(protected, Tensor):
        options = replace(options, protected=protected)
    elif isinstance(protected, bool) or not isinstance(protected, int) or protected < 0:
        _check.fail("protected as an integer of at least 0 or a bool tensor", repr(protected))
    else:
        prefix = protected
    kind = kind_of(Merging, options, module)
    return kind(module, _blocks(module, blocks), own, options, prefix, full_length)
