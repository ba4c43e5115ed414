"""Token merging inside vision towers."""

from vidtok.merge.attach import Merging
from vidtok.merge.block import Halves
from vidtok.merge.custom import attach_any
from vidtok.merge.frames import FrameMerging, FramePositions
from vidtok.merge.options import ToMe
from vidtok.merge.run import Step, unmerge, weighted_mean
from vidtok.merge.schedule import Schedule, inflected
from vidtok.merge.tempme import TempMe

__all__ = [
    "FrameMerging",
    "FramePositions",
    "Halves",
    "Merging",
    "Schedule",
    "Step",
    "TempMe",
    "ToMe",
    "attach_any",
    "inflected",
    "unmerge",
    "weighted_mean",
]
