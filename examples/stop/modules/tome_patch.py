"""``from modules.tome_patch import apply_tome_patch``, as in the published code."""

from vidtok.systems.stop import apply_tome_patch

__all__ = ["apply_tome_patch"]
