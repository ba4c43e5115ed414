"""Metrics of tasks that reduced models are judged by."""

from __future__ import annotations

from vidtok.evaluation.retrieval import Scores, evaluate, ranks, score

__all__ = ["Scores", "evaluate", "ranks", "score"]
