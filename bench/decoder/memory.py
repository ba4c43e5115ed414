"""Peak memory of scoring one layer, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from bench.decoder.model import Size


def _scores(tokens: int, width: int, device: torch.device) -> Callable[[], Any]:
    """Scores and choice among ``tokens`` visual tokens at one layer of Qwen2-7B's attention, in fp32."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    from vidtok.models import budgets, scoring
    from vidtok.models.drop import resolve_drop
    from vidtok.models.report import Unit
    from vidtok.models.tokens import Tokens

    config = Qwen2Config(
        hidden_size=width, intermediate_size=64, num_attention_heads=max(2, width // 128), num_hidden_layers=1,
        num_key_value_heads=max(2, width // 896), max_position_embeddings=65536,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device(device):
        layer = Qwen2DecoderLayer(config, 0).eval()
        rotary = Qwen2RotaryEmbedding(config)
    hidden = torch.randn(1, tokens + 40, 64, device=device).repeat(1, 1, width // 64)
    drop = resolve_drop("attn_0_0.3")
    units = [Unit("video", 0, (1, 1, tokens))]
    seen = Tokens.of(torch.arange(8, 8 + tokens, device=device), units, [tokens], (1, tokens + 40), None)
    key = budgets.keys(drop, seen)
    position = rotary(hidden[..., :1], torch.arange(tokens + 40, device=device)[None])
    asking = scoring.queries(drop, seen)
    original = budgets.originals(key)

    def run() -> Any:
        return scoring.select(
            drop, 0, key, original, layer=layer, hidden=hidden, position_embeddings=position, asking=asking
        )

    return run


def _memory_child(tokens: int, width: int, threads: int, pipe: Any) -> None:
    from bench.memory import _forget_peak, _status_mib

    torch.set_num_threads(threads)
    with torch.no_grad():
        _scores(256, width, torch.device("cpu"))()  # threads, imports and code pages
        run = _scores(tokens, width, torch.device("cpu"))
        _forget_peak()
        before = _status_mib("VmRSS")
        result = run()
        pipe.send(_status_mib("VmHWM") - before)
        del result


def scoring_memory(size: Size, device: torch.device, threads: int) -> float:
    """MiB that scoring takes at its peak beyond the hidden states; a process of its own on a CPU."""
    if device.type == "cuda":
        run = _scores(size.scored, size.scored_width, device)
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory_child, args=(size.scored, size.scored_width, threads, sender))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()
