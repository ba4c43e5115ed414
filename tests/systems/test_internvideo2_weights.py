"""InternVideo2's vision encoder from files: names, shapes, positions, and what differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.systems.internvideo2_tiny import HEADS, TINY, WIDTH, clip, make
from vidtok.systems import internvideo2
from vidtok.systems.internvideo2 import InternVideo2, InternVideo2Config, Vision, positions


def published(depth: int = 40, frames: int = 4, **changes: tuple[int, ...]) -> dict[str, Tensor]:
    """The published names and shapes of stage 2, 1B, without memory behind them."""
    c, hidden = 1408, 6144
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, 1 + frames * 256, c),
        "patch_embed.proj.weight": (c, 3, 1, 14, 14),
        "patch_embed.proj.bias": (c,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (c,),
            f"blocks.{i}.norm2.weight": (c,),
            f"blocks.{i}.attn.qkv.weight": (3 * c, c),
            f"blocks.{i}.attn.q_norm.weight": (c,),
            f"blocks.{i}.attn.k_norm.weight": (c,),
            f"blocks.{i}.attn.proj.weight": (c, c),
            f"blocks.{i}.attn.proj.bias": (c,),
            f"blocks.{i}.ls1.gamma": (c,),
            f"blocks.{i}.ls2.gamma": (c,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, c),
            f"blocks.{i}.mlp.fc1.bias": (hidden,),
            f"blocks.{i}.mlp.fc2.weight": (c, hidden),
            f"blocks.{i}.mlp.fc2.bias": (c,),
        }
    for part in "qkv":
        shapes |= {
            f"clip_projector.norm1_{part}.weight": (c,), f"clip_projector.norm1_{part}.bias": (c,),
            f"clip_projector.cross_attn.{part}.weight": (c, c), f"clip_projector.cross_attn.{part}_bias": (c,),
        }  # fmt: skip
    shapes |= {"clip_projector.cross_attn.proj.weight": (768, c), "clip_projector.cross_attn.proj.bias": (768,)}
    return {name: torch.empty(shape, device="meta") for name, shape in {**shapes, **changes}.items()}


def test_the_published_names_and_shapes():
    state = published()
    config = internvideo2.read_config(state)
    assert config == InternVideo2Config() and config.hidden == 6144
    with torch.device("meta"):
        model = InternVideo2(config)
    internvideo2.load_state_dict(model, state)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert 1.0e9 < sum(p.numel() for p in model.parameters()) < 1.1e9


def test_separate_positions_and_those_of_images():
    places = {"pos_embed_cls": (1, 1, 1408), "pos_embed_spatial": (1, 256, 1408), "pos_embed_temporal": (1, 4, 1408)}
    state = published(1, **places)
    del state["pos_embed"]
    assert internvideo2.read_config(state) == InternVideo2Config(depth=1, sep_pos_embed=True)
    state = published(1, img_pos_embed=(1, 257, 1408))
    assert internvideo2.read_config(state) == InternVideo2Config(depth=1, sep_image_video_pos_embed=True)


def wrapped(state: dict[str, Tensor]) -> dict:
    """As a whole model has them, with what only training reads."""
    extra = {
        "text_encoder.embeddings.weight": torch.zeros(2), "temp": torch.zeros(()), "vision_proj.weight": torch.zeros(2),
        "vision_encoder.clip_decoder.0.head.weight": torch.zeros(2), "vision_encoder.clip_pos_embed": torch.zeros(2),
        "clip_teacher.patch_embed.proj.weight": torch.zeros(2),
        "vision_encoder.final_clip_decoder.norm.bias": torch.zeros(2),
    }  # fmt: skip
    return {"module": {**{f"vision_encoder.{key}": value for key, value in state.items()}, **extra}}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_load(tmp_path, suffix):
    from safetensors.torch import save_file

    model, path = make(), tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(wrapped(model.state_dict()), path)
    else:
        save_file(model.state_dict(), path)
    other = internvideo2.load(path, num_heads=HEADS, attn_pool_num_heads=4, img_size=28)
    with torch.no_grad():
        assert torch.equal(other(clip()).pooled, model(clip()).pooled)
    with pytest.raises(ValueError, match="expected a file of weights, got none at"):
        internvideo2.load(tmp_path / "missing.pt")


def test_a_width_that_its_ratio_rounds_down():
    """A ratio of two widths times the second may end below the first."""
    assert int(112 * (488 / 112)) == 487
    state = make(embed_dim=112, mlp_ratio=488.5 / 112).state_dict()
    config = internvideo2.read_config(state, num_heads=HEADS, attn_pool_num_heads=4, img_size=28)
    assert config.hidden == 488
    internvideo2.load_state_dict(InternVideo2(config), state)


def test_keys_that_differ_are_named():
    model = make()
    state = model.state_dict()
    for name in [key for key in state if key.startswith(("blocks.0", "blocks.2"))]:
        del state[name]
    state |= {"decoder.weight": torch.zeros(1), "cls_token": torch.zeros(1, 1, 4)}
    with pytest.raises(ValueError) as error:
        internvideo2.load_state_dict(model, state)
    text = str(error.value)
    assert "26 missing (blocks.0.attn.k_norm.weight, blocks.0.attn.proj.bias" in text and "and 16 more)" in text
    assert "1 unexpected (decoder.weight)" in text
    assert "1 of another shape (cls_token [1, 1, 4] for [1, 1, 32])" in text
    with pytest.raises(ValueError, match=r"expected a state dict with one patch_embed.proj.weight, got 0 among 1 keys"):
        internvideo2.load_state_dict(model, {"a": torch.zeros(1)})


def test_other_frame_counts_only_when_asked():
    model, eight = make(), InternVideo2(InternVideo2Config(**{**TINY, "num_frames": 8}))
    with pytest.raises(ValueError, match=r"pos_embed \[1, 17, 32\] for \[1, 33, 32\]\); interpolate=True"):
        internvideo2.load_state_dict(eight, model.state_dict())
    internvideo2.load_state_dict(eight, model.state_dict(), interpolate=True)
    have, made = model.pos_embed[0, 1:].view(4, 4, WIDTH), eight.pos_embed[0, 1:].view(8, 4, WIDTH)
    assert torch.equal(eight.pos_embed[:, 0], model.pos_embed[:, 0])
    for step in range(8):
        at = min(max((step + 0.5) / 2 - 0.5, 0), 3)
        low = int(at)
        want = have[low] + (at - low) * (have[min(low + 1, 3)] - have[low])
        torch.testing.assert_close(made[step], want)


def test_positions_are_sines_and_cosines():
    table = positions.joint(WIDTH, (2, 2, 3))[0]
    assert table.shape == (13, WIDTH) and not table[0].any()
    time, row, column = 1, 1, 2
    got = table[1 + (time * 2 + row) * 3 + column]
    want = []
    for place, channels in ((time, 8), (column, 12), (row, 12)):
        angles = [place / 10000 ** (2 * i / channels) for i in range(channels // 2)]
        want += [torch.tensor(a).sin() for a in angles] + [torch.tensor(a).cos() for a in angles]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 225}, "img_size as a multiple of patch_size=14"),
        ({"num_heads": 5}, "embed_dim as a multiple of num_heads=5"),
        ({"tubelet_size": 3}, "num_frames as a multiple of tubelet_size=3"),
        ({"embed_dim": 1400, "num_heads": 10, "attn_pool_num_heads": 10}, "a multiple of 16"),
        ({"sep_pos_embed": True, "sep_image_video_pos_embed": True}, "got both"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InternVideo2Config(**options)


def test_the_result_has_names():
    assert Vision._fields == ("tokens", "pooled")
