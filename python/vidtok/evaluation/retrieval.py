"""Video-text retrieval: embeddings of all clips and captions, R@k, median and mean rank in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vidtok._check import fail
from vidtok.data.retrieval.datasets import EvaluationClips
from vidtok.data.retrieval.frames import normalize
from vidtok.data.retrieval.tokenizer import Words
from vidtok.evaluation.ranking import Ranks, count, join

GALLERIES = ("videos", "captions")


@dataclass(frozen=True)
class Scores:
    """R@1, R@5 and R@10 in percent, median and mean rank from 1, and how many queries there were."""

    r1: float
    r5: float
    r10: float
    median: float
    mean: float
    queries: int

    @classmethod
    def of(cls, ranks: Ranks) -> Scores:
        """Of the ranks of all queries."""
        expected = ranks.expected()
        recall = [100 * float(ranks.within(k).mean()) for k in (1, 5, 10)]
        # torch's median takes the lower of two middle ones.
        return cls(
            recall[0], recall[1], recall[2], float(expected.quantile(0.5)), float(expected.mean()), len(expected)
        )

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """With the usual names: ``R@1``, ``R@5``, ``R@10``, ``MdR``, ``MnR``."""
        names = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "median": "MdR", "mean": "MnR", "queries": "queries"}
        return {prefix + names[k]: v for k, v in asdict(self).items()}


def ranks(
    text: Tensor, video: Tensor, owner: Sequence[int] | Tensor, *, gallery: str = "videos", chunk: int = 1024
) -> tuple[Ranks, Ranks]:
    r"""Ranks of both directions, text to video and video to text, with :math:`\langle t_i, v_j \rangle` as score.

    Equal scores are taken in random order and ranks and recalls are expectations over it, so that a model which gives
    everything the same score is worth no more than chance. The published form sorts and looks for the diagonal's
    *value*: a tie gives a query several ranks and changes what the mean is over.

    Video to text over ``videos``: a video is compared with the other videos by the best caption of each, as CLIP4Clip
    does for MSVD; over ``captions``: the rank of its best caption among all captions. With one caption per video both
    are the same.

    Args:
        text: ``[C, D]``.
        video: ``[V, D]``.
        owner: ``[C]``, the video of each caption; every video has one.
        gallery: ``videos`` or ``captions``.
        chunk: rows of similarities held at once.

    Raises:
        ValueError: for shapes that do not fit, scores that are no numbers, a video without a caption.

    Source: Luo et al., "CLIP4Clip", Neurocomputing 2022, section 4.

    Example:
        >>> t2v, v2t = ranks(torch.eye(3), torch.eye(3), [0, 1, 2])
        >>> t2v.expected().tolist()
        [1.0, 1.0, 1.0]
    """
    belongs = torch.as_tensor(owner, dtype=torch.int64).to(text.device)
    if text.dim() != 2 or video.dim() != 2 or text.shape[1] != video.shape[1] or len(belongs) != len(text):
        fail("text [C, D], video [V, D] and owner [C]", f"{list(text.shape)}, {list(video.shape)} and [{len(belongs)}]")
    if not len(text) or not len(video) or int(belongs.min()) < 0 or int(belongs.max()) >= len(video):
        fail("owners from 0 to the number of videos", f"{len(text)} captions of {len(video)} videos with others")
    if gallery not in GALLERIES:
        fail(f"a gallery among {', '.join(GALLERIES)}", repr(gallery))
    if chunk < 1:
        fail("chunk of at least 1 row", f"{chunk}")
    text, video = text.float(), video.float()
    if not bool((torch.bincount(belongs, minlength=len(video)) > 0).all()):
        fail("a caption for every video", "a video without one")
    everything = torch.arange(len(video), device=text.device)
    forward = [
        count(text[a : a + chunk] @ video.t(), belongs[a : a + chunk, None] == everything)
        for a in range(0, len(text), chunk)
    ]
    backward = []
    for a in range(0, len(video), chunk):
        similarity = video[a : a + chunk] @ text.t()
        if gallery == "videos":
            best = similarity.new_full((len(similarity), len(video)), -torch.inf)
            similarity = best.scatter_reduce(1, belongs.expand(len(similarity), -1), similarity, "amax")
            right = everything[a : a + chunk, None] == everything
        else:
            right = everything[a : a + chunk, None] == belongs
        backward.append(count(similarity, right))
    return join(forward), join(backward)


def score(
    text: Tensor, video: Tensor, owner: Sequence[int] | Tensor, *, gallery: str = "videos", chunk: int = 1024
) -> dict[str, Scores]:
    """:class:`Scores` of ``text_to_video`` and ``video_to_text``; arguments as in :func:`ranks`."""
    forward, backward = ranks(text, video, owner, gallery=gallery, chunk=chunk)
    return {"text_to_video": Scores.of(forward), "video_to_text": Scores.of(backward)}


@torch.no_grad()
def evaluate(
    model: Any,
    clips: EvaluationClips,
    words: Words,
    *,
    batch_size: int = 16,
    workers: int = 0,
    gallery: str = "videos",
    accelerator: Any = None,
    notify: Callable[[int, int], None] | None = None,
    sources: bool = False,
) -> dict[str, Any]:
    """Embed every clip and caption once, in batches, and score them.

    Args:
        model: has ``encode_text(input_ids, attention_mask)`` and ``encode_video(video, video_mask)``, both ``[B, D]``
            of length 1. It is in evaluation mode meanwhile.
        clips: what to embed, with the captions.
        words: makes token ids.
        batch_size: clips at once in one process; captions come four times as many.
        workers: processes that decode.
        gallery: see :func:`ranks`.
        accelerator: of accelerate, to share the clips among processes and for its autocast.
        notify: called with (clips done, clips in all).
        sources: also tell where every patch went, by the model's ``source_map()``.

    Returns:
        ``text_to_video`` and ``video_to_text`` (:class:`Scores`), ``unreadable`` (names of clips left out); where
        ``sources`` is asked for and tokens merged, ``sources``: int16 or int32 ``[V, T, 1 + P]``, in which token of
        its frame (of its video, where frames joined) each class token and patch is at the end, and ``clips``, the
        names of the V clips.
    """
    plain = accelerator.unwrap_model(model) if accelerator is not None else model
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    loader: Any = DataLoader(clips, batch_size=batch_size, num_workers=workers, generator=torch.Generator())
    if accelerator is not None:
        from accelerate.data_loader import prepare_data_loader

        # Not by the accelerator itself, which would keep every loader of every evaluation.
        loader = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            put_on_device=True,
        )
    was = plain.training
    plain.eval()
    try:
        videos, readable, merged = _videos(plain, loader, len(clips), device, accelerator, notify, sources)
        texts = _texts(plain, clips.pairs.captions, words, 4 * batch_size, device, accelerator)
    finally:
        plain.train(was)
    keep = readable.nonzero().flatten()
    if not len(keep):
        fail("a clip that decodes", f"none out of {len(clips)}")
    renumbered = torch.full((len(clips),), -1)
    renumbered[keep] = torch.arange(len(keep))
    owner = renumbered[torch.tensor(clips.pairs.owner)]
    scores = score(
        texts[(owner >= 0).to(texts.device)], videos[keep.to(videos.device)], owner[owner >= 0], gallery=gallery
    )
    names = [clip.name for clip in clips.pairs.clips]
    result = {**scores, "unreadable": [n for n, read in zip(names, readable.tolist()) if not read]}
    if merged is not None:
        result |= {"sources": merged[keep], "clips": [names[i] for i in keep.tolist()]}
    return result


def _autocast(accelerator: Any) -> Any:
    import contextlib

    return contextlib.nullcontext() if accelerator is None else accelerator.autocast()


def _videos(
    model: Any, loader: Any, total: int, device: torch.device, accelerator: Any, notify: Any, sources: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    out: Tensor | None = None
    merged: Tensor | None = None
    readable = torch.zeros(total, dtype=torch.int64)
    done = 0
    for batch in loader:
        index, video = batch["index"].to(device), normalize(batch["video"].to(device))
        with _autocast(accelerator):
            found = model.encode_video(video, batch["video_mask"].to(device)).float()
        parts: dict[str, Tensor] = {"index": index, "found": found, "readable": batch["readable"].to(device)}
        source = model.source_map() if sources else None
        if source is not None:
            # NCCL has no 16 bits to gather.
            parts["source"] = source.int().unflatten(0, (len(index), -1))
        if accelerator is not None:
            # Clips that fill up the last batch of a process come twice; they are written twice to one row.
            parts = {k: accelerator.gather(v) for k, v in parts.items()}
        if out is None:
            out = torch.zeros(total, found.shape[1], device=device)
        out[parts["index"]] = parts["found"]
        readable[parts["index"].cpu()] = parts["readable"].cpu()
        if source is not None:
            shape = parts["source"].shape[1:]
            if merged is None:
                merged = torch.zeros(total, *shape, dtype=torch.int16 if shape.numel() < 2**15 else torch.int32)
            merged[parts["index"].cpu()] = parts["source"].to("cpu", merged.dtype)
        done = min(total, done + len(parts["index"]))
        if notify is not None:
            notify(done, total)
    assert out is not None
    return out, readable, merged


def _texts(
    model: Any, captions: Sequence[str], words: Words, batch: int, device: torch.device, accelerator: Any
) -> Tensor:
    """Every process embeds all captions: a text costs a hundredth of a clip."""
    out = []
    for start in range(0, len(captions), batch):
        ids, mask = words(captions[start : start + batch])
        with _autocast(accelerator):
            out.append(model.encode_text(ids.to(device), mask.to(device)).float())
    return torch.cat(out)
