"""Families of transformers with video that are not taken, and the line that stands in the way."""

from __future__ import annotations

#: (folder in transformers, reason)
UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (
        "embedding_gemma2",
        "an encoder: `create_bidirectional_mask(**mask_kwargs)` in EmbeddingGemma2TextModel.forward, and no generation",
    ),
    (
        "instructblipvideo",
        "`outputs = self.language_model.generate(**inputs, **generate_kwargs)` in its generate: the forward that knows "
        "which tokens are visual does not run",
    ),
)
