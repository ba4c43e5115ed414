"""Video files to frames, and frames to patches."""

from vidtok.data.patchify import Patches, PatchSpec, patchify, smart_resize
from vidtok.data.video import Frames, Limits, Video, VideoError, VideoReader, load_video, resize_frames

__all__ = [
    "Frames",
    "Limits",
    "PatchSpec",
    "Patches",
    "Video",
    "VideoError",
    "VideoReader",
    "load_video",
    "patchify",
    "resize_frames",
    "smart_resize",
]
