"""Hook points in Hugging Face video-language models."""

from vidtok.models.attach import Handle, attach
from vidtok.models.report import Report, Sample

__all__ = ["Handle", "Report", "Sample", "attach"]
