"""Vision configs of the grid families."""

from __future__ import annotations

from typing import Any

from tests.models.zoo._common import END, IMAGE, START, VIDEO, VIDEO_END, VIDEO_START

SECTION = {"mrope_section": [2, 3, 3]}
VISION_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
GLM_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": VIDEO_START, "video_end_token_id": VIDEO_END,
}  # fmt: skip
#: GLM gives the frames of a video the placeholder of images.
GLM_BATCH = {"stamps": True, "video": IMAGE, "around": (VIDEO_START, VIDEO_END)}


def qwen3_vision(deepstack: bool = False) -> dict[str, Any]:
    """Vision arguments of the Qwen3-VL kind."""
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 64,
        "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return {**tower, "deepstack_visual_indexes": [0]} if deepstack else tower


def glm_vision(**more: Any) -> dict[str, Any]:
    """Vision arguments of the GLM-4V kind."""
    return {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_heads": 2,
        "image_size": 112, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **more,
    }  # fmt: skip


def hybrid(layers: int, linear: str = "linear_attention", full: str = "full_attention") -> list[str]:
    """Kinds of layers: linear ones first, every second one and the last with attention."""
    return [full if i % 2 or i == layers - 1 else linear for i in range(layers)]
