"""State dicts of CLIP in the original form and in that of transformers, with every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from vidtok import _check
from vidtok.systems.stop.config import Sizes

# Numbers that the original archives have beside the weights, and buffers of transformers.
_IGNORED = {
    "input_resolution",
    "context_length",
    "vocab_size",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}
_TOWERS = (
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
)
_BLOCK = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_TRANSPOSED = ("visual.proj", "text_projection")
_SIZED = (
    "visual.conv1.weight",
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.proj",
    "token_embedding.weight",
    "positional_embedding",
)


def _first(names: Iterable[str]) -> str:
    names = sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _refuse(missing: Iterable[str], unexpected: Iterable[str], what: str) -> NoReturn:
    missing, unexpected = list(missing), list(unexpected)
    parts = [f"without {_first(missing)}"] if missing else []
    parts += [f"with the unexpected {_first(unexpected)}"] if unexpected else []
    _check.fail(f"a state dict with the keys of {what}", f"one {' and '.join(parts)}")


def _rename(name: str, back: bool = False) -> str:
    for pairs in (_TOWERS, _BLOCK):
        for theirs, ours in pairs:
            old, new = (ours, theirs) if back else (theirs, ours)
            whole = not old.endswith(".")
            if name == old if whole else (name.startswith(old) if pairs is _TOWERS else old in name):
                name = name.replace(old, new, 1)
                break
    return re.sub(r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{q,k,v}_proj.\1", name) if back else name


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if found:
            target = f"{_rename(found[1] + '.')}attn.in_proj_{found[3]}"
            packed.setdefault(target, {})[found[2]] = value
        else:
            target = _rename(name)
            out[target] = value.t() if target in _TRANSPOSED and value.dim() == 2 else value
    for target, parts in packed.items():
        if len(parts) < 3:
            prefix = _rename(target, back=True).replace("{q,k,v}", "{}")
            _refuse([prefix.format(part) for part in "qkv" if part not in parts], [], "CLIP")
        out[target] = torch.cat([parts[part] for part in "qkv"])
    return out


@dataclass
class Weights:
    """Weights of CLIP by their original names, and those of the prompts.

    Attributes:
        clip: of the backbone.
        prompts: of :class:`vidtok.systems.stop.Stop`, empty where a checkpoint has CLIP alone.
        theirs: whether the names were those of transformers.
    """

    clip: dict[str, Tensor]
    prompts: dict[str, Tensor]
    theirs: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Weights:
        """From a state dict of CLIP in either form, or of :class:`vidtok.systems.stop.CLIP4Clip`."""
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            _check.fail("a state dict of tensors", type(state).__name__)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        prompts = {name.removeprefix("stop."): value for name, value in state.items() if name.startswith("stop.")}
        clip = {name.removeprefix("clip."): value for name, value in state.items() if not name.startswith("stop.")}
        clip = {name: value for name, value in clip.items() if name not in _IGNORED}
        theirs = any(name.startswith(("vision_model.", "text_model.")) for name in clip)
        return cls(_from_transformers(clip) if theirs else clip, prompts, theirs)

    def _name(self, name: str) -> str:
        return _rename(name, back=True) if self.theirs else name

    def sizes(self, vision_heads: int | None = None, text_heads: int | None = None) -> Sizes:
        """Sizes as the shapes say them; heads have 64 channels where no number is given."""
        missing = [self._name(name) for name in _SIZED if name not in self.clip]
        if missing:
            _refuse(missing, [], "a CLIP with a vision transformer")
        shape = {name: tuple(self.clip[name].shape) for name in _SIZED}
        width, _, patch, _ = shape["visual.conv1.weight"]
        context, text_width = shape["positional_embedding"]
        grid = round((shape["visual.positional_embedding"][0] - 1) ** 0.5)

        def layers(prefix: str) -> int:
            found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in self.clip)
            return max((int(match[1]) for match in found if match), default=-1) + 1

        return Sizes(
            grid * patch,
            patch,
            width,
            layers("visual.transformer.resblocks."),
            vision_heads or max(1, width // 64),
            context,
            shape["token_embedding.weight"][0],
            text_width,
            layers("transformer.resblocks."),
            text_heads or max(1, text_width // 64),
            shape["visual.proj"][1],
        )

    def load(self, clip: nn.Module, prompts: nn.Module | None) -> None:
        """Copy every weight.

        Raises:
            ValueError: for keys that are missing or unexpected, of which the first ten are named, and for
                shapes that differ.
        """
        self._load(clip, self.clip, "CLIP")
        if self.prompts:
            if prompts is None:
                _refuse([], [f"stop.{name}" for name in self.prompts], "a model with temporal_prompt='none'")
            self._load(prompts, self.prompts, "STOP's prompts with these settings")

    def _load(self, module: nn.Module, state: dict[str, Tensor], what: str) -> None:
        own = module.state_dict()
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or unexpected:
            _refuse(map(self._name, missing), map(self._name, unexpected), what)
        for name, value in own.items():
            if value.shape != state[name].shape:
                _check.fail(f"{self._name(name)} of shape {list(value.shape)}", str(list(state[name].shape)))
        module.load_state_dict(state)
