"""Gemma 3n: frames as images, an embedding per layer; a convolution stands in for the tower of timm."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.zoo import _common, _frames

NAME, MIN_VERSION, ROWS = "gemma3n", (5, 17), _frames.RUNS
REFUSED = {"attn": "expected a layer of one residual stream"}


class Tower(nn.Module):
    """Two by two features of a frame, in the layout of timm's towers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 28, 28)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=self.conv(pixel_values))


def make(attention: str = "sdpa", layers: int = 5, seed: int = 0) -> Any:
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration, Gemma3nModel
    from transformers.models.gemma3n import modeling_gemma3n as modeling

    layers = max(layers, 5)
    kinds = ["sliding_attention"] * (layers - 4) + ["sliding_attention", "full_attention"] * 2
    config = Gemma3nConfig(
        text_config=_common.text_config(
            layers, head_dim=16, sliding_window=16, layer_types=kinds,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=244, num_kv_shared_layers=2, laurel_rank=8,
            altup_num_inputs=2, activation_sparsity_pattern=[0.0] * layers,
        ),
        vision_config={"hidden_size": 32, "vocab_size": 6, "vocab_offset": 244},
        audio_config={
            "hidden_size": 32, "vocab_size": 4, "vocab_offset": 252, "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2, "sscp_conv_channel_size": [4, 4], "input_feat_size": 16,
        },
        vision_soft_tokens_per_image=4, image_token_id=IMAGE, audio_token_id=AUDIO,
    )  # fmt: skip
    automatic, vision = modeling.AutoModel, config.vision_config

    class Towers:
        @staticmethod
        def from_config(config: Any, **options: Any) -> Any:
            return Tower() if config is vision else automatic.from_config(config, **options)

    modeling.AutoModel = Towers
    try:
        model = _common.build(Gemma3nForConditionalGeneration, config, attention, seed)
    finally:
        modeling.AutoModel = automatic
    assert isinstance(model.model, Gemma3nModel)
    return model


IMAGE, AUDIO = 246, 253


def batch(samples: list[list[_common.Clip]], side: str = "left", seed: int = 10) -> dict[str, Tensor]:
    out = _frames.text(samples, _frames.runs(28, IMAGE), side, seed)
    ids = out["input_ids"]
    out["input_ids"] = torch.where((ids == _common.START) | (ids == _common.END), 245, ids)
    return {**out, "pixel_values": torch.cat(_frames.pixels(samples))}


def row(inputs: dict[str, Tensor], samples: list[list[_common.Clip]], i: int) -> dict[str, Tensor]:
    return _frames.per_frame_row(inputs, samples, i, "pixel_values")
