"""dots3-note: latent attention, sliding layers and layers that index their keys."""

from functools import partial
from typing import Any

from tests.models.zoo import _common as common

NAME, MIN_VERSION, ROWS = "dots3_note", (5, 23), common.ROWS
REFUSED = {"attn": "expected attn at an attention layer"}
batch, row = partial(common.grid_batch, types=False, temporal=1), common.grid_row


def make(attention: str = "sdpa", layers: int = 2, seed: int = 0) -> Any:
    from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

    text = common.text_config(
        layers, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=16,
        index_topk=512, index_head_dim=16, index_n_heads=2, shared_experts_intermediate_size=32, sliding_window=24,
        layer_types=["indexed_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=32, swa_kv_lora_rank=16,
        swa_head_dim=16, swa_qk_nope_head_dim=8, swa_v_head_dim=16,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "dense"],
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 64,
    }  # fmt: skip
    config = Dots3NoteConfig(
        text_config=text, vision_config=vision, audio_config=audio, audio_token_id=common.AUDIO, **common.ids()
    )
    return common.build(Dots3NoteForConditionalGeneration, config, attention, seed)
