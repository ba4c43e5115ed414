"""The thinker of Qwen3-Omni."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "qwen3_omni_moe", (4, 57), _common.ROWS
if _common.VERSION[0] > 4:  # before, the unreduced model cannot join deepstack features of both kinds
    MIXED = _common.tiny.MIXED
batch, row = partial(_common.grid_batch, types=False, seconds="video_second_per_grid"), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    text = _common.text_config(
        layers, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        **_common.rope(**_grids.SECTION, mrope_interleaved=True),
    )  # fmt: skip
    audio = {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "max_source_positions": 32, "n_window": 8, "output_dim": 64, "downsample_hidden_size": 8,
    }  # fmt: skip
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text, vision_config=_grids.qwen3_vision(True), audio_config=audio, audio_token_id=_common.AUDIO,
        image_token_id=_common.IMAGE, video_token_id=_common.VIDEO, audio_start_token_id=245, audio_end_token_id=246,
        vision_start_token_id=_common.START, vision_end_token_id=_common.END,
    )  # fmt: skip
    return _common.build(Qwen3OmniMoeThinkerForConditionalGeneration, config, attention, seed)
