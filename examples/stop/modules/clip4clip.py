"""``from modules.clip4clip import CLIP4Clip``, as in the published code."""

from vidtok.systems.stop import CLIP4Clip

__all__ = ["CLIP4Clip"]
