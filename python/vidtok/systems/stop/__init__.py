"""Text-video retrieval: CLIP4Clip, and STOP's prompts on it, with token merging in the vision tower."""

from vidtok.systems.stop.clip import CLIP
from vidtok.systems.stop.config import PRESETS, SIM_HEADERS, TEMPORAL_PROMPTS, Config, Sizes
from vidtok.systems.stop.files import NAMES, load, read, save, tiny
from vidtok.systems.stop.loss import gather, symmetric_cross_entropy
from vidtok.systems.stop.model import CLIP4Clip
from vidtok.systems.stop.tome import apply_tome_patch, left
from vidtok.systems.stop.tower import Stop

__all__ = [
    "CLIP",
    "NAMES",
    "PRESETS",
    "SIM_HEADERS",
    "TEMPORAL_PROMPTS",
    "CLIP4Clip",
    "Config",
    "Sizes",
    "Stop",
    "apply_tome_patch",
    "gather",
    "left",
    "load",
    "read",
    "save",
    "symmetric_cross_entropy",
    "tiny",
]
