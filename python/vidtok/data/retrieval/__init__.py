"""Video-text retrieval data: annotations of the published sets, frames with a cache, captions to tokens."""

from vidtok.data.retrieval.annotations import READERS, Annotations
from vidtok.data.retrieval.cache import FrameCache
from vidtok.data.retrieval.datasets import EpochSampler, EvaluationClips, TrainingPairs
from vidtok.data.retrieval.frames import FrameLoader, FrameRule, normalize, pick
from vidtok.data.retrieval.pairs import Clip, Pairs, load_pairs
from vidtok.data.retrieval.tokenizer import Words, load_tokenizer, train_tokenizer

__all__ = [
    "READERS",
    "Annotations",
    "Clip",
    "EpochSampler",
    "EvaluationClips",
    "FrameCache",
    "FrameLoader",
    "FrameRule",
    "Pairs",
    "TrainingPairs",
    "Words",
    "load_pairs",
    "load_tokenizer",
    "normalize",
    "pick",
    "train_tokenizer",
]
