"""The thinker of Qwen2.5-Omni."""

from functools import partial

from tests.models.zoo import _common, _grids

NAME, MIN_VERSION, ROWS = "qwen2_5_omni", (4, 57), _common.ROWS
batch, row = partial(_common.grid_batch, types=False, seconds="video_second_per_grid"), _common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> object:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    text = _common.text_config(layers, **_common.rope(**_grids.SECTION))
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    audio = {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "max_source_positions": 32, "n_window": 8, "output_dim": 64,
    }  # fmt: skip
    config = Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, audio_token_index=_common.AUDIO,
        image_token_index=_common.IMAGE, video_token_index=_common.VIDEO, audio_start_token_id=245,
        audio_end_token_id=246, vision_start_token_id=_common.START, vision_end_token_id=_common.END,
    )  # fmt: skip
    return _common.build(Qwen2_5OmniThinkerForConditionalGeneration, config, attention, seed)
