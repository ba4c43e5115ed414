"""What ``generate`` does with a prompt, which nothing that it hands to the model tells."""

from __future__ import annotations

import sys
from typing import Any


def _local(names: tuple[str, ...], variable: str) -> Any:
    """A variable of the step of ``generate`` that runs the model; None when another one does, or none."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "generate":
        if frame.f_code.co_name in names:
            return frame.f_locals.get(variable)
        frame = frame.f_back
    return None


def in_chunks() -> bool:
    """Whether the prompt comes in parts (``prefill_chunk_size``)."""
    config = _local(("_prefill", "_prefill_chunking"), "generation_config")
    return getattr(config, "prefill_chunk_size", None) is not None


def candidates() -> int:
    """Columns behind the prompt that assisted decoding has proposed."""
    count = _local(("_assisted_decoding",), "candidate_length")
    return 0 if count is None else int(count)
