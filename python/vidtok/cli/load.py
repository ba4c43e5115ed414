"""Models for the command line: from a folder, from the hub's cache, or built from a config with random weights."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from vidtok.cli.errors import InputError, one_line
from vidtok.data import PatchSpec

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Args:
        model: in eval mode on its device.
        tokenizer: its tokenizer.
        spec: its patch rules.
        name: what to call it.
        random: whether its weights are random.
    """

    model: Any
    tokenizer: Any
    spec: PatchSpec
    name: str
    random: bool = False


def device_of(name: str) -> torch.device:
    """The device to run on; ``auto`` is the GPU when there is one.

    Raises:
        InputError: for a name that is no device, or one that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"expected --device auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"expected a device that is here, got {name!r} with {torch.cuda.device_count()} GPUs visible")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype to run in; ``auto`` is bfloat16 where the device multiplies it natively, else float32."""
    if name not in DTYPES:
        raise InputError(f"expected --dtype among {', '.join(DTYPES)}, got {name!r}")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_name(name: str) -> None:
    """Refuse what is neither a folder with a config nor the form of a hub id, before anything is loaded.

    Raises:
        InputError: saying which of the two it fails to be.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"expected --model to be a folder with a config.json, got {one_line(name)!r} without one")
        return
    parts = name.split("/")
    plain = all(p and p[0] not in ".-" and all(c.isalnum() or c in "._-" for c in p) for p in parts)
    if path.exists() or len(parts) > 2 or not plain:
        raise InputError(f"expected --model to be a checkpoint folder or a hub id, got {one_line(name)!r}")


def _unreachable() -> bool:
    """Whether the hub's name does not even resolve, which its client finds out only after long retries."""
    if any(os.environ.get(k) for k in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return False
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


def load(name: str, *, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Loaded:
    """Load a checkpoint; code inside it is never run.

    Raises:
        InputError: one sentence for a model that is not there, not supported, or does not load.
    """
    check_name(name)
    _quiet()
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    from vidtok.models.families import CORE

    shown = one_line(name)
    local = Path(name).is_dir()
    offline = local or _unreachable()
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except Exception as error:
        if local:
            raise InputError(f"expected a model config in {shown!r}, got {one_line(error, 160)}") from error
        raise InputError(
            f"expected --model to be a checkpoint folder, or an id that is cached or on a reachable hub, "
            f"got {shown!r}, which could not be loaded"
        ) from error
    kind = getattr(config, "model_type", None)
    if kind not in CORE:
        raise InputError(f"expected a model among {', '.join(CORE)}, got {shown!r} of type {kind!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        folder = name if local else _cached_folder(name, offline)
        spec = PatchSpec.for_model(config, folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, **where
        )
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"expected a whole checkpoint in {shown!r}, got {what}") from error
    return Loaded(model.to(device).eval(), tokenizer, spec, Path(name).resolve().name if local else name)


def _cached_folder(name: str, local_files_only: bool) -> str | None:
    """Folder of the hub cache that holds the processor files of ``name``."""
    from huggingface_hub import hf_hub_download

    found = None
    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):
        try:
            found = found or os.path.dirname(hf_hub_download(name, file, local_files_only=local_files_only))
        except Exception:  # an older checkpoint lacks one of the two
            continue
    return found


def byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes and Qwen's special tokens, made without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def random_model(
    *,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    vision_layers: int,
    vision_width: int,
    vision_heads: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    max_pixels: int = 28 * 28 * 768,
) -> Loaded:
    """A Qwen2.5-VL of the given size with random weights and a byte-level tokenizer."""
    _quiet()
    import transformers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = byte_tokenizer()
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL}
    head = width // heads
    sections = [head // 2 - 2 * (head * 3 // 16), head * 3 // 16, head * 3 // 16]
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": sections}
    older = {"rope_theta": 1e6, "rope_scaling": rope}
    rotary = older if transformers.__version__.startswith("4.") else {"rope_parameters": {**rope, "rope_theta": 1e6}}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
        **rotary,
    }
    step = max(1, vision_layers // 4)
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_width,
        "intermediate_size": vision_width * 11 // 4 // 16 * 16,
        "num_heads": vision_heads,
        "out_hidden_size": width,
        "fullatt_block_indexes": list(range(step - 1, vision_layers, step)),
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    # A random model would stop at any moment; an answer of fixed length makes runs comparable.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = token["<|endoftext|>"]
    spec = PatchSpec.for_model(config)
    spec = PatchSpec(**{**spec.__dict__, "max_pixels": max_pixels, "min_pixels": min(spec.min_pixels, max_pixels)})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = f"Qwen2.5-VL, {layers} layers of width {width}, {size:.0f} M random weights"
    return Loaded(model.to(device=device, dtype=dtype).eval(), tokenizer, spec, name, random=True)
