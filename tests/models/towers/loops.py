"""Packed vision towers with merging tokens, written with loops over patches that know where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.merge.reference import attention


@dataclass
class Token:
    """One token: its value, the places (frame order, packed) that it stands for, and its row and column."""

    x: Tensor
    places: list[int]
    at: tuple[int, int]


def groups(metric: Tensor, r: int, protected: int = 0) -> list[list[int]]:
    """Who merges with whom in one segment, destinations first: the protected, sources that stay, destinations."""
    tokens = len(metric)
    sources = [i for i in range(0, tokens, 2) if i >= protected]
    targets = [i for i in range(1, tokens, 2) if i >= protected]
    r = min(r, (tokens - protected) // 2, len(sources)) if targets else 0
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = []
    for source in sources if r else ():
        cosines = [round(float(unit[source] @ unit[target]) * 2**20) for target in targets]
        best.append((-max(cosines), source, targets[cosines.index(max(cosines))]))
    gone = {source: target for _, source, target in sorted(best)[:r]}
    if not gone:
        return [[i] for i in range(tokens)]
    stay = list(range(protected)) + [i for i in sources if i not in gone] + targets
    return [[i, *(source for source, target in gone.items() if target == i)] for i in stay]


def turn(x: Tensor, at: list[tuple[int, int]]) -> Tensor:
    """Rotary positions of ``[H, n, D]`` by row and column."""
    d = x.shape[-1]
    frequency = 1.0 / 10000.0 ** (torch.arange(0, d // 2, 2).float() / (d // 2))
    angles = torch.stack([torch.cat([row * frequency, column * frequency]) for row, column in at]).repeat(1, 2)
    half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def segments(x: Tensor, grid: list[list[int]], side: int) -> list[list[list[Token]]]:
    """Frames of windows of tokens; ``side`` patches of a window, 0 for one window a frame. Patches lie 2×2."""
    frames, place = [], 0
    for t, h, w in grid:
        for _ in range(t):
            windows: dict[tuple[int, int], list[Token]] = {}
            for cell in range(h * w // 4):
                row, column = cell // (w // 2), cell % (w // 2)
                key = (2 * row // side, 2 * column // side) if side else (0, 0)
                for i in range(4):
                    token = Token(x[place], [place], (2 * row + i // 2, 2 * column + i % 2))
                    windows.setdefault(key, []).append(token)
                    place += 1
            frames.append([windows[key] for key in sorted(windows)])
    return frames


def full(frames: list[list[list[Token]]], tokens: int) -> Tensor:
    """``[N, C]`` in the order of the patches: each has the value of the token that stands for it."""
    out: list[Any] = [None] * tokens
    for frame in frames:
        for window in frame:
            for token in window:
                for place in token.places:
                    out[place] = token.x
    return torch.stack(out)


def run(
    tower: Any, x: Tensor, grid: list[list[int]], counts: Any, prop_attn: bool = True, metric: str = "keys"
) -> tuple[list[Tensor], list[list[list[Token]]]]:
    """What each block gives, at full length ``[N, C]``, and the tokens that are left.

    ``x`` are the patches as the first block gets them, in the order of the processor; ``counts(layer, length)`` says
    how many merge in a segment that had ``length`` patches.
    """
    own = getattr(tower, "window_size", 0) // tower.patch_size if hasattr(tower, "window_size") else 0
    whole = getattr(tower, "fullatt_block_indexes", ())
    frames = segments(x, grid, own)
    lengths = [[len(window) for window in frame] for frame in frames]
    given = []
    for layer, block in enumerate(tower.blocks):
        heads = block.attn.num_heads
        for f, frame in enumerate(frames):
            together = [[w for window in frame for w in window]] if not own or layer in whole else frame
            keys: dict[int, Tensor] = {}
            after: dict[int, Tensor] = {}
            for part in together:
                y = torch.stack([token.x for token in part])
                qkv = block.attn.qkv(block.norm1(y)).unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
                at = [token.at for token in part]
                q, k, v = turn(qkv[0], at), turn(qkv[1], at), qkv[2]
                size = torch.tensor([float(len(token.places)) for token in part])
                out = attention(q, k, v, size if prop_attn else None, q.shape[-1] ** -0.5)
                y = y + block.attn.proj(out.transpose(0, 1).flatten(1))
                compared = {"keys": k.mean(0), "values": v.mean(0), "hidden": y}[metric]
                for i, token in enumerate(part):
                    keys[id(token)], after[id(token)] = compared[i], y[i]
            merged = []
            for window, length in zip(frame, lengths[f], strict=True):
                made = []
                for group in groups(torch.stack([keys[id(t)] for t in window]), counts(layer, length)):
                    members = [window[i] for i in group]
                    total = sum(len(t.places) for t in members)
                    value = sum(len(t.places) * after[id(t)] for t in members) / total
                    made.append(Token(value, [p for t in members for p in t.places], members[0].at))
                merged.append(made)
            for made in merged:
                y = torch.stack([token.x for token in made])
                y = y + block.mlp(block.norm2(y))
                for token, value in zip(made, y, strict=True):
                    token.x = value
            frames[f] = merged
        given.append(full(frames, len(x)))
    return given, frames


def dense(blocks: Any, x: Tensor, r: int, protected: int) -> list[Tensor]:
    """What each block of CLIP, SigLIP or InternVL gives for one image ``[T, C]``, at full length."""
    tokens = [Token(value, [i], (0, 0)) for i, value in enumerate(x)]
    given = []
    for block in blocks:
        part = getattr(block, "self_attn", None) or block.attention
        before = getattr(block, "layer_norm1", None) or block.layernorm_before
        after = getattr(block, "layer_norm2", None) or block.layernorm_after
        out = getattr(part, "out_proj", None) or part.projection_layer
        scales = [getattr(block, f"lambda_{i}", 1.0) for i in (1, 2)]
        y = torch.stack([token.x for token in tokens])
        q, k, v = (getattr(part, f"{n}_proj")(before(y)).unflatten(-1, (part.num_heads, -1)) for n in "qkv")
        q, k, v = (h.transpose(0, 1) for h in (q, k, v))
        size = torch.tensor([float(len(token.places)) for token in tokens])
        mixed = attention(q, k, v, size, q.shape[-1] ** -0.5).transpose(0, 1).flatten(1)
        y = y + scales[0] * out(mixed)
        made = []
        for group in groups(k.mean(0), r, protected):
            members = [tokens[i] for i in group]
            value = sum(len(tokens[i].places) * y[i] for i in group) / sum(len(t.places) for t in members)
            made.append(Token(value, [p for t in members for p in t.places], (0, 0)))
        y = torch.stack([token.x for token in made])
        y = y + scales[1] * block.mlp(after(y))
        for token, value in zip(made, y, strict=True):
            token.x = value
        tokens = made
        given.append(full([[tokens]], len(x)))
    return given


class Recorded:
    """What the blocks of an unreduced tower are called with, and what the last one gives, in a ``with`` block."""

    def __init__(self, blocks: Any) -> None:
        self.blocks, self.calls, self.last = blocks, [], None

    def __enter__(self) -> Recorded:
        def before(block: Any, args: Any, kwargs: Any) -> None:
            named = {name: kwargs[name] for name in kwargs if name != "hidden_states"}
            self.calls.append(((*args, kwargs.get("hidden_states"))[0], named))

        def after(block: Any, args: Any, out: Any) -> None:
            self.last = out[0] if isinstance(out, tuple) else out

        self.handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in self.blocks]
        self.handles.append(self.blocks[-1].register_forward_hook(after))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def by_modules(blocks: Any, calls: list[Any], r: int) -> Tensor:
    """What the last block of any packed tower gives, ``[N, C]``, with ``r`` merges in each of the first's sequences.

    Projections, norms and rotations are the modules' own, one sequence at a time; attention and merging are loops.
    """
    from transformers import AttentionInterface

    state: dict[str, Any] = {}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, **_: Any) -> tuple[Tensor, None]:
        state["keys"] = k[0].mean(0)
        k, v = (h[0].repeat_interleave(q.shape[1] // h.shape[1], 0) for h in (k, v))
        return attention(q[0], k, v, state["size"], scaling).transpose(0, 1)[None], None

    AttentionInterface.register("loops", attend)
    x, first = calls[0]
    borders = first["cu_seqlens"].tolist()
    windows = [[Token(x[i], [i], (i, 0)) for i in range(a, b)] for a, b in zip(borders, borders[1:])]
    for block, (_, options) in zip(blocks, calls, strict=True):
        part = getattr(block, "attn", None) or block.self_attn
        before = getattr(block, "norm1", None) or block.layer_norm1
        after = getattr(block, "norm2", None) or block.layer_norm2
        own, ends = part.config._attn_implementation, options["cu_seqlens"].tolist()
        part.config._attn_implementation = "loops"
        keys: dict[int, Tensor] = {}
        for a, b in zip(ends, ends[1:]):
            tokens = [t for s, window in zip(borders, windows) if a <= s < b for t in window]
            places = torch.tensor([token.at[0] for token in tokens])
            given = {k: v for k, v in options.items() if k not in ("cu_seqlens", "max_seqlen")}
            if given.get("position_embeddings") is not None:
                given["position_embeddings"] = tuple(p[places] for p in given["position_embeddings"])
            if given.get("rotary_pos_emb") is not None:
                given["rotary_pos_emb"] = given["rotary_pos_emb"][places]
            state["size"] = torch.tensor([float(len(token.places)) for token in tokens])
            y = torch.stack([token.x for token in tokens])
            out = part(before(y), cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32), **given)
            y = y + (out[0] if isinstance(out, tuple) else out)
            for i, token in enumerate(tokens):
                token.x, keys[id(token)] = y[i], state["keys"][i]
        part.config._attn_implementation = own
        for w, window in enumerate(windows):
            made = []
            for group in groups(torch.stack([keys[id(t)] for t in window]), r):
                members = [window[i] for i in group]
                value = sum(len(t.places) * t.x for t in members) / sum(len(t.places) for t in members)
                made.append(Token(value, [p for t in members for p in t.places], members[0].at))
            y = torch.stack([token.x for token in made])
            y = y + block.mlp(after(y))
            windows[w] = [Token(value, token.places, token.at) for token, value in zip(made, y, strict=True)]
    return full([windows], len(x))
