"""CLIP4Clip: text-video retrieval with CLIP, with STOP's prompts or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok import _check
from vidtok.merge.options import ToMe
from vidtok.merge.run import Run
from vidtok.merge.tempme import TempMe
from vidtok.systems.stop import checkpoint
from vidtok.systems.stop.clip import CLIP
from vidtok.systems.stop.config import Config, Sizes
from vidtok.systems.stop.loss import gather, symmetric_cross_entropy
from vidtok.systems.stop.runs import plan_of
from vidtok.systems.stop.tome import options_of
from vidtok.systems.stop.tower import Stop


class CLIP4Clip(nn.Module):
    r"""Retrieval of videos by text and of text by videos.

    A video's embedding is the mean of its frames' normalised embeddings (``temporal_prompt="none"``), or that
    of STOP's first video prompt; logits are :math:`e^{s} \langle t / |t|, v / |v| \rangle`; the loss is the
    symmetric cross-entropy over the batch of all processes.

    Args:
        cross_config: of the cross encoder of other similarity headers; ``meanP`` has none, and it is not read.
        clip_state_dict: weights of CLIP in the original form or in that of transformers, or
            :class:`Sizes` for random ones. With the keys of :func:`vidtok.systems.stop.save`, also the prompts.
        task_config: a namespace or mapping with the fields of :class:`Config`; further ones are ignored.

    Raises:
        ValueError: settings out of range, keys of a checkpoint that are missing or unexpected.

    Source: Luo et al., CLIP4Clip, Neurocomputing 2022; see :class:`Stop`.

    Example:
        >>> model = CLIP4Clip(None, Sizes(32, 8, 32, 2, 4, 16, 64, 32, 2, 4, 16), {"tome_r": 2})
        >>> model.encode_video(torch.randn(2, 5, 3, 32, 32), torch.ones(2, 5)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self, cross_config: Any, clip_state_dict: Mapping[str, Tensor] | Sizes, task_config: Any = None
    ) -> None:
        super().__init__()
        self.config = Config.of(task_config)
        self.task_config = task_config if task_config is not None else self.config.namespace()
        if isinstance(clip_state_dict, Sizes):
            weights, self.sizes = None, clip_state_dict
        else:
            weights = checkpoint.Weights.of(clip_state_dict)
            self.sizes = weights.sizes(self.config.vision_heads, self.config.text_heads)
        self.config = replace(self.config, vision_heads=self.sizes.vision_heads, text_heads=self.sizes.text_heads)
        self.clip = CLIP(self.sizes)
        self.stop = Stop(self.sizes, self.config) if self.config.temporal_prompt != "none" else None
        #: Whether prompts are there that nothing has trained.
        self.untrained = self.stop is not None and (weights is None or not weights.prompts)
        if weights is not None:
            weights.load(self.clip, self.stop)
        #: What merges in the vision tower; None merges nothing.
        self.tome: ToMe | TempMe | None = None
        #: What merged in the last pass.
        self.run: Run | None = None
        self.set_tome(self.config.tome_r, self.config.tome_trace_source, self.config.tome_prop_attn)
        self._freeze(self.config.freeze_layer_num)

    # ------------------------------------------------------------------ settings
    def set_tome(self, tome_r: Any = 0, trace_source: bool = False, prop_attn: bool = True) -> None:
        """Merge ``tome_r`` tokens of every frame in every layer from now on; 0 takes the merging out."""
        config = replace(self.config, tome_r=tome_r, tome_trace_source=trace_source, tome_prop_attn=prop_attn)
        self.tome, self.run, self.config = options_of(config, self.sizes), None, config

    def _freeze(self, layers: int) -> None:
        if layers < 0:
            return
        everything = self.stop is not None and layers >= self.sizes.vision_layers
        heads = ("ln_final", "text_projection", "logit_scale", "visual.ln_post", "visual.proj")
        for name, p in self.clip.named_parameters():
            free = name.startswith(heads)
            if "resblocks." in name:
                free = int(name.split("resblocks.")[1].split(".")[0]) >= layers
            p.requires_grad_(free and not everything)

    def parameter_groups(self, lr: float, coef_lr: float = 1.0, weight_decay: float = 0.2) -> list[dict[str, Any]]:
        """Groups for AdamW: CLIP's weights at ``lr · coef_lr``, the others at ``lr``; vectors do not decay."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups.setdefault((name.startswith("clip."), p.dim() > 1), []).append(p)
        return [
            {"params": params, "lr": lr * (coef_lr if own else 1.0), "weight_decay": weight_decay if decay else 0.0}
            for (own, decay), params in groups.items()
        ]

    # ------------------------------------------------------------------ embeddings
    def _frames(self, video: Tensor) -> Tensor:
        """``[B, T, 3, H, W]`` from that or from ``[B, pairs, T, 1, 3, H, W]``."""
        video = torch.as_tensor(video)
        if video.dim() == 7:
            video = video.flatten(2, 3).flatten(0, 1)
        if video.dim() != 5 or not video.shape[1]:
            _check.fail("video of shape [B, T, 3, H, W] with a frame or more", str(list(video.shape)))
        return video if video.is_floating_point() else video.float()

    def _visual(self, video: Tensor) -> Tensor:
        """``[B, T, E]`` of frames, ``[B, 1, E]`` with prompts."""
        if self.stop is not None:
            out, self.run = self.stop(self.clip.visual, video, self.tome)
            return out.unsqueeze(1)
        again = self.config.gradient_checkpointing
        out, self.run = self.clip.visual(video.flatten(0, 1), self.tome, video.shape[1], again)
        return out.unflatten(0, video.shape[:2])

    def _pool(self, visual: Tensor, video_mask: Tensor | None) -> Tensor:
        """Mean over the frames that the mask names of normalised ``[B, T, E]``, normalised: ``[B, E]``."""
        visual = F.normalize(visual.float(), dim=-1)
        if visual.shape[1] > 1 or self.stop is None:
            if video_mask is None:
                visual = visual.mean(1)
            else:
                mask = video_mask.reshape(-1, video_mask.shape[-1]).to(visual.dtype)
                if mask.shape != visual.shape[:2]:
                    _check.fail(f"video_mask of shape {list(visual.shape[:2])}", str(list(video_mask.shape)))
                total = mask.sum(1, keepdim=True)
                # A sum of products, and no einsum, which autocast takes to half precision.
                visual = (visual * mask[..., None]).sum(1) / torch.where(total > 0, total, 1.0)
            return F.normalize(visual, dim=-1)
        return visual[:, 0]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Captions ``[B, L]`` to normalised embeddings ``[B, E]``; padding after the end of the text is not seen."""
        return F.normalize(self.clip.encode_text(input_ids.reshape(-1, input_ids.shape[-1])).float(), dim=-1)

    def encode_video(self, video: Tensor, video_mask: Tensor | None = None) -> Tensor:
        """Videos ``[B, T, 3, H, W]`` to normalised embeddings ``[B, E]``.

        ``video_mask`` ``[B, T]`` names the frames that the mean goes over; with prompts the tower sees all frames,
        as published.
        """
        return self._pool(self._visual(self._frames(video)), video_mask)

    # ------------------------------------------------------------------ CLIP4Clip's interface
    def get_sequence_output(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        shaped: bool = False,
    ) -> Tensor:
        """``[B, 1, E]``, not normalised."""
        return self.clip.encode_text(input_ids.reshape(-1, input_ids.shape[-1])).float().unsqueeze(1)

    def get_visual_output(
        self, video: Tensor, video_mask: Tensor | None = None, shaped: bool = False, video_frame: int = -1
    ) -> Tensor:
        """``[B, T, E]`` of frames, ``[B, 1, E]`` with prompts, not normalised.

        ``shaped`` videos are ``[B · video_frame, 3, H, W]``.
        """
        if shaped:
            video = torch.as_tensor(video).unflatten(0, (-1, video_frame))
        return self._visual(self._frames(video)).float()

    def get_sequence_visual_output(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        video: Tensor,
        video_mask: Tensor | None = None,
        shaped: bool = False,
        video_frame: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Both outputs."""
        return (
            self.get_sequence_output(input_ids, token_type_ids, attention_mask),
            self.get_visual_output(video, video_mask, shaped, video_frame),
        )

    def get_similarity_logits(
        self,
        sequence_output: Tensor,
        visual_output: Tensor,
        attention_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        shaped: bool = False,
        loose_type: bool = True,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Logits ``[texts, videos]``, and nothing beside."""
        return self._logits(sequence_output, self._pool(visual_output, video_mask)), ()

    def _logits(self, sequence: Tensor, pooled: Tensor) -> Tensor:
        text = F.normalize(sequence.reshape(-1, sequence.shape[-1]).float(), dim=-1)
        # Times a factor of up to 100 differences of similar pairs are below the steps of half precision.
        with torch.autocast(text.device.type, enabled=False):
            return self.clip.logit_scale.float().exp() * text @ pooled.float().t()

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        video: Tensor,
        video_mask: Tensor | None = None,
    ) -> Tensor | None:
        """The loss in training, None in evaluation."""
        text = self.encode_text(input_ids, attention_mask)
        pooled = self.encode_video(video, video_mask)
        if not self.training:
            return None
        if text.shape[0] != pooled.shape[0]:
            _check.fail(f"as many videos as the {text.shape[0]} captions", str(pooled.shape[0]))
        text, pooled = gather(text), gather(pooled)
        return symmetric_cross_entropy(self._logits(text, pooled))

    # ------------------------------------------------------------------ what merged
    def source_map(self) -> Tensor | None:
        """int64 ``[B T, 1 + P]``: in which token of its frame each class token and patch is at the end.

        Frame after frame of video after video, of the last pass; where frames have joined, in which token of its
        video. None where nothing merged.

        Raises:
            ValueError: without ``tome_trace_source``.
        """
        if self.tome is None or not self.tome.trace:
            _check.fail("tome_trace_source=True with tome_r of at least 1", str(self.tome))
        plan = None if self.run is None else plan_of(self.run)
        if plan is None or self.run is None:
            return None
        owner = torch.repeat_interleave(plan.offset.diff().long(), output_size=plan.num_in)
        place = torch.empty_like(owner).index_copy_(0, plan.member.long(), owner)
        first = plan.cu_seqlens_out[:-1].long().repeat_interleave(plan.cu_seqlens_in.diff().long())
        return (place - first).view(-1, self.run.tokens[0])
