"""The pictures of merged patches: a group has the mean colour of its pixels, whatever the tower."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
transformers = pytest.importorskip("transformers")
PATH = Path(__file__).parents[2] / "examples" / "trace_pictures.py"


@pytest.fixture(scope="module")
def example() -> Any:
    found = importlib.util.spec_from_file_location("trace_pictures", PATH)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    drawn = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(6):
            picture = drawn.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_group_has_its_mean_colour(example: Any) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    owner = torch.arange(16)
    owner[[5, 6]] = 5
    out = example.painted(frame, owner, 4, scale=4)
    assert np.array_equal(out[:8, :8], frame[:2, :2].repeat(4, 0).repeat(4, 1))
    wanted = frame[2:4, 2:6].reshape(-1, 3).mean(0).astype(np.uint8)
    inner = out[9:16, 9:24].reshape(-1, 3)
    assert (inner == wanted).all()
    assert (out[8, 8:24] == 255).all()


def test_owners_are_where_the_plan_put_tokens(example: Any) -> None:
    import vidtok.ops

    x = torch.randn(2, 9, 4)
    merged, _, plan = vidtok.ops.bipartite_merge(x, x, 3, protected=1)
    owner = example.owners(plan, 2, 9)
    sums = torch.zeros(merged.shape[0] * merged.shape[1], 4).index_add_(0, owner.flatten(), x.flatten(0, 1))
    counts = owner.flatten().bincount()[:, None]
    torch.testing.assert_close(sums / counts, merged.flatten(0, 1))
    assert torch.equal(example.owners(None, 2, 9), torch.arange(9).expand(2, -1))


def test_both_kinds_of_models(example: Any, video: Path, tmp_path: Path) -> None:
    from vidtok.systems.stop import save, tiny

    save(tiny(32, 8, 32, 3, 2), tmp_path / "clip4clip")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    for name in ("clip4clip", "clip"):
        out = example.picture(video, tmp_path / name, "tome:r=4", count=2)
        # The frame and two layers that merge, 96 pixels each.
        assert out.shape == (2 * 96 + 6, 3 * 96 + 12, 3), name
        first, last = out[:96, :96], out[:96, -96:]
        assert not np.array_equal(first, last)
        assert (last == 255).all(-1).any()
