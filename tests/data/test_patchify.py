"""Patches equal those of the Hugging Face video processors, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.torchvision_stub import install
from vidtok.data import PatchSpec, load_video, patchify, smart_resize

HALF = (0.5, 0.5, 0.5)
QWEN3 = PatchSpec(16, 2, 2, 128 * 32 * 32, 32 * 32 * 768, HALF, HALF, True)
SPECS = {"qwen2_vl": PatchSpec(), "qwen3_vl": QWEN3}
# Frames, height, width: even, odd, tiny, narrow, and large enough to shrink.
SHAPES = [(4, 272, 640), (5, 144, 176), (2, 34, 45), (3, 90, 700), (2, 1080, 1920)]


def frames_of(shape: tuple[int, int, int]) -> torch.Tensor:
    """Frames from integers only: an edge, a ramp and some texture."""
    t, h, w = shape
    f, c, y, x = torch.meshgrid(*map(torch.arange, (t, 3, h, w)), indexing="ij")
    value = (7 * y + 3 * x + 40 * c + 11 * f) % 256
    return torch.where((x // 5 + y // 3) % 4 == 0, (x * y + 31 * f) % 256, value).to(torch.uint8)


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What transformers' own processors give for ``SHAPES``."""
    folder = tmp_path_factory.mktemp("processors")
    torch.save([frames_of(shape) for shape in SHAPES], folder / "in.pt")
    code = f"""
    import torch
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    videos, out = torch.load({str(folder / "in.pt")!r}, weights_only=True), {{}}
    for name, processor in (("qwen2_vl", Qwen2VLVideoProcessor()), ("qwen3_vl", Qwen3VLVideoProcessor())):
        rows = [processor(v, return_tensors="pt", do_sample_frames=False) for v in videos]
        out[name] = [{{k: r[k] for k in ("pixel_values_videos", "video_grid_thw")}} for r in rows]
    torch.save(out, {str(folder / "out.pt")!r})
    """
    path = [str(install(folder / "site")), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_equal_to_the_processor(processed: dict, family: str, case: int) -> None:
    expected = processed[family][case]
    got = patchify(frames_of(SHAPES[case]), SPECS[family])
    assert [list(got.grid_thw)] == expected["video_grid_thw"].tolist()
    assert torch.equal(got.pixel_values_videos, expected["pixel_values_videos"])


def test_equal_to_recorded_values() -> None:
    """Recorded from the processors with torchvision 0.28.0 itself (``record.py`` beside this file)."""
    rows = json.loads((Path(__file__).parent / "processor_values.json").read_text())
    assert len(rows) == 2 * len(SHAPES[:4])
    for row in rows:
        got = patchify(frames_of(tuple(row["shape"])), SPECS[row["family"]])
        assert list(got.grid_thw) == row["grid_thw"]
        sample = got.pixel_values_videos.flatten()[row["at"] :: row["step"]]
        # One grey level, the most that fixed-point resizing differs between instruction sets.
        torch.testing.assert_close(sample, torch.tensor(row["values"]), atol=1.01 / 255 / 0.26, rtol=0)


def test_resize_false_and_chunks(clip: Path) -> None:
    spec = PatchSpec(min_pixels=56 * 56, max_pixels=96 * 96)
    video = load_video(clip, count=7, size=spec.size)
    whole = patchify(video.frames, spec)
    for step in (1, 2, 3, 7):
        parts = patchify(video.frames.split(step), spec, resize=False)
        assert parts.grid_thw == whole.grid_thw == (4, 4, 6)
        assert torch.equal(parts.pixel_values_videos, whole.pixel_values_videos)


def test_layout_by_hand() -> None:
    """Token order is block by block, and inside a patch channel, frame, row, column."""
    t, h, w = 2, 56, 84
    frames = torch.zeros(t, 3, h, w, dtype=torch.uint8)
    frames[1, 2, 14 + 3, 28 + 5] = 255
    spec = PatchSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    out = patchify(frames, spec, resize=False)
    (row, column), *rest = torch.nonzero(out.pixel_values_videos).tolist()
    assert not rest and out.grid_thw == (1, 4, 6)
    # Patch (1, 2) lies in block (0, 1) at (1, 0): four patches before its block, two before it inside.
    assert row == 4 + 2 and column == ((2 * 2 + 1) * 14 + 3) * 14 + 5
    assert out.pixel_values_videos[row, column] == 1.0


@given(st.integers(1, 3000), st.integers(1, 3000), st.one_of(st.none(), st.integers(1, 64)))
def test_smart_resize_keeps_its_bounds(height: int, width: int, frames: int | None) -> None:
    low, high = (128 * 28 * 28, 28 * 28 * 768) if frames is None else (4 * 32 * 32 * 32, 32 * 32 * 12288)
    factor = 28 if frames is None else 32
    if max(height, width) > 150 * min(height, width):
        return
    h, w = smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high, num_frames=frames)
    assert h % factor == 0 and w % factor == 0 and h >= factor and w >= factor
    scale = 1 if frames is None else max(2, round(frames / 2) * 2)
    assert h * w * min(scale, frames or 1) <= high or factor in (h, w)


def test_refusals() -> None:
    frames = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    for bad in (frames.float(), frames[0], frames[:, :1], "frames"):
        with pytest.raises(ValueError, match=r"uint8 frames of shape \[T, 3, H, W\]"):
            patchify([bad] if isinstance(bad, str) else bad, PatchSpec(), resize=False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="multiples of 28, got 56 x 50"):
        patchify(frames[:, :, :50], PatchSpec(), resize=False)
    with pytest.raises(ValueError, match="at least one frame"):
        patchify([], PatchSpec(), resize=False)
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_resize(2, 1000)
    with pytest.raises(ValueError, match="at least 1 x 1"):
        smart_resize(0, 10)


def test_spec_of_a_model(tmp_path: Path) -> None:
    vision = SimpleNamespace(patch_size=16, temporal_patch_size=2, spatial_merge_size=2)
    config = SimpleNamespace(model_type="qwen3_vl", vision_config=vision)
    assert PatchSpec.for_model(config) == QWEN3
    values = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 1}))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(values))
    spec = PatchSpec.for_model(config, tmp_path)
    assert (spec.min_pixels, spec.max_pixels, spec.mean, spec.std) == (4096, 25165824, (0.1, 0.2, 0.3), HALF)
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        PatchSpec.for_model(config, tmp_path)
    with pytest.raises(ValueError, match="got model type 'llama'"):
        PatchSpec.for_model(SimpleNamespace(model_type="llama"))
