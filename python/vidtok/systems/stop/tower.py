"""STOP's vision tower: frames that attend to themselves, and prompts of the video that attend to all of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtok.merge import attention
from vidtok.merge.options import ToMe
from vidtok.merge.run import Run, Step
from vidtok.merge.tempme import TempMe
from vidtok.systems.stop.attention import Attention, Block
from vidtok.systems.stop.clip import VisionTransformer
from vidtok.systems.stop.config import Config, Sizes
from vidtok.systems.stop.prompts import Adapter, FramePrompt, PixelPrompt, Prompts
from vidtok.systems.stop.runs import begin, each, join, recomputed, sizes


class Stop(nn.Module):
    r"""The prompts of STOP, and the pass of a video through CLIP's vision tower with them.

    The published sequence is token-major, :math:`[g_1 … g_G, x_{l=0,t=0} … x_{l=0,t=T-1}, x_{l=1,t=0} …]`
    with a frame's class token at l = 0, its prompts next and then its patches. In every layer, with the same
    weights, (a) a frame's tokens attend to the video's prompts and to the tokens of their frame, (b) the video's
    prompts attend to everything. Before each layer the frame prompts are overwritten by that layer's. The
    embedding is that of the first prompt of the video.

    What is computed differently, with equal results:

    - keys and values are projected once and serve both attentions; (b) runs over the keys of (a), in which the
      video's prompts are there once per frame and count 1/T each;
    - frame prompts are keys and values only: what a layer makes of them is overwritten before it is read;
    - the last layer computes the first prompt of the video alone.

    Args:
        backbone: its sizes.
        config: the settings.

    Source: Liu et al., STOP: Integrated Spatial-Temporal Dynamic Prompting for Video Understanding, CVPR 2025;
    Yang et al., DGL: Dynamic Global-Local Prompt Tuning for Text-Video Retrieval, AAAI 2024.
    """

    def __init__(self, backbone: Sizes, config: Config) -> None:
        super().__init__()
        self.again = config.gradient_checkpointing
        self.prompts = Prompts(backbone, config)
        self.adapters = nn.ModuleList(
            Adapter(backbone.vision_width, config.adapter_width, config.adapter_scale)
            for _ in range(backbone.vision_layers if config.lora else 0)
        )
        dynamic = config.temporal_prompt == "group2-2"
        self.pixels = PixelPrompt(backbone, config) if dynamic else None
        self.between = FramePrompt(backbone, config) if dynamic else None

    def frame_prompts(self, layer: int, between: Tensor | None) -> Tensor:
        """``[1 or B, 1 or T, prompts, C]`` of a layer."""
        own = self.prompts.frame[layer][None, None]
        return own if between is None else own.to(between.dtype) + between

    def feed(self, block: Block, layer: int, x: Tensor) -> Tensor:
        """The MLP half with its adapter."""
        out = block.feed(x)
        return out + self.adapters[layer](x) if len(self.adapters) else out

    def forward(
        self, visual: VisionTransformer, video: Tensor, options: ToMe | TempMe | None = None
    ) -> tuple[Tensor, Run | None]:
        """``[B, T, 3, H, W]`` to embeddings ``[B, E]``, and the run of what merged."""
        batch, frames = video.shape[:2]
        if self.pixels is not None:
            video = self.pixels(video.to(visual.conv1.weight.dtype))
        patches = visual.patches(video.flatten(0, 1))
        between = None if self.between is None else self.between(patches.unflatten(0, (batch, frames)))
        x = visual.prepare(patches)
        g = self.prompts.video.to(x.dtype).expand(batch, -1, -1)
        blocks = visual.transformer.blocks
        run = begin(options, len(blocks), x.shape[1], frames)
        for layer, block in enumerate(blocks):
            step = None if run is None else run.step(layer)
            prompts = self.frame_prompts(layer, between).to(x.dtype).expand(-1, frames, -1, -1)
            kind = self.layer if layer < len(blocks) - 1 else self.last_layer
            g, x = recomputed(self.again, kind, layer, block, g, x, prompts, step)
        return visual.project(g[:, 0]), run

    def layer(
        self, layer: int, block: Block, g: Tensor, x: Tensor, prompts: Tensor, step: Step | None
    ) -> tuple[Tensor, Tensor]:
        """Prompts of the video ``[B, G, C]`` and frames ``[B T, n, C]`` after a layer."""
        g, x = self.attend(block, g, join(step, x), prompts, step)
        x = self.feed(block, layer, x if step is None else step.merge(x))
        return self.feed(block, layer, g), x

    def last_layer(
        self, layer: int, block: Block, g: Tensor, x: Tensor, prompts: Tensor, step: Step | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`layer`, of the first prompt alone."""
        return self.feed(block, layer, self.attend_last(block, g, join(step, x), prompts, step)), x

    def attend(self, block: Block, g: Tensor, x: Tensor, prompts: Tensor, step: Step | None) -> tuple[Tensor, Tensor]:
        """Both attentions: ``[B, G, C]`` prompts of the video and ``[B T, n, C]`` frames, residuals added."""
        attn, width = block.attn, block.attn.width
        gs, xs = attn.project(block.ln_1(g)), attn.project(block.ln_1(x))
        keys = self.keys(gs[..., width:], self.prompt_keys(block, prompts), xs[..., width:], each(step))
        k, v = attn.split(keys)
        (q,) = attn.split(xs[..., :width])
        before = k.shape[2] - x.shape[1]
        if step is not None:
            step.note(k[:, :, before:], v[:, :, before:])
        size = sizes(step, x.shape[0], g.shape[1], *prompts.shape[1:3])
        x = x + attn.join(self.sized(q, k, v, size, step))
        return g + self.attend_video(attn, gs[..., :width], keys, size, step), x

    def attend_last(self, block: Block, g: Tensor, x: Tensor, prompts: Tensor, step: Step | None) -> Tensor:
        """The attention half of the first prompt of the video alone, ``[B, 1, C]``."""
        attn, gs = block.attn, block.ln_1(g)
        own = attn.project(block.ln_1(x), 1)
        keys = self.keys(attn.project(gs, 1), self.prompt_keys(block, prompts), own, each(step))
        size = sizes(step, x.shape[0], g.shape[1], *prompts.shape[1:3])
        return g[:, :1] + self.attend_video(attn, attn.project(gs[:, :1], 0, 1), keys, size, step)

    def prompt_keys(self, block: Block, prompts: Tensor) -> Tensor:
        """Keys and values of ``[1 or B, T, P, C]``; prompts that all frames share are projected once."""
        own = prompts[:, :1] if self.between is None else prompts
        return block.attn.project(block.ln_1(own), 1).expand(-1, prompts.shape[1], -1, -1)

    def keys(self, g: Tensor, prompts: Tensor, x: Tensor, each: int) -> Tensor:
        """Keys and values ``[B T, G + P + n, 2 C]`` of every frame: the video's prompts, the frame's, its tokens.

        ``each`` frames of a clip have their prompts next to each other.
        """
        batch, clips = g.shape[0], x.shape[0] // g.shape[0]
        missing = clips * each - prompts.shape[1]
        if missing:
            prompts = F.pad(prompts, (0, 0, 0, 0, 0, missing))
        prompts = prompts.expand(batch, -1, -1, -1).reshape(batch * clips, -1, prompts.shape[-1])
        g = g[:, None].expand(-1, clips, -1, -1).flatten(0, 1)
        return torch.cat([g.to(x.dtype), prompts.to(x.dtype), x], 1)

    def attend_video(
        self, attn: Attention, query: Tensor, keys: Tensor, size: Tensor | None, step: Step | None
    ) -> Tensor:
        """The video's prompts attend to the keys of all frames, among which they themselves are, once per frame."""
        batch, own = query.shape[0], self.prompts.video.shape[0]
        groups = keys.shape[0] // batch
        count = keys.new_ones(groups, keys.shape[1], dtype=torch.float32)
        count[:, :own] = 1 / groups
        count = count.view(1, -1).expand(batch, -1)
        if size is not None:
            count = count * size.view(batch, -1)
        (q,) = attn.split(query)
        k, v = attn.split(keys.view(batch, -1, keys.shape[-1]))
        return attn.join(self.sized(q, k, v, count, step))

    def sized(self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, step: Step | None) -> Tensor:
        """Attention whose keys weigh by size."""
        scale = 1 / math.sqrt(q.shape[-1])
        # In training a checkpoint may run a layer without gradients and then with them, and must merge alike.
        attend = attention.plain if self.training else attention.sdpa
        if size is None:
            return attend(q, k, v, None, scale)
        form = attention.choose("auto" if step is None else step.run.options.form, q.device, False)
        return attention.FORMS[form](attend, q, k, v, size, None, scale)
