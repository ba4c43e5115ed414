"""InternVideo2's stage-2 vision encoder."""

from vidtok.systems.internvideo2.checkpoint import load, load_state_dict, read_config
from vidtok.systems.internvideo2.config import InternVideo2Config
from vidtok.systems.internvideo2.model import InternVideo2, Vision

__all__ = ["InternVideo2", "InternVideo2Config", "Vision", "load", "load_state_dict", "read_config"]
