"""Where the tensors of a call may lie; fake tensors stand for those of GPUs."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vidtok.ops._library import _gpu_index

NAMES = ("x", "anchor", "grid", "tensors")


@pytest.fixture
def on():
    with FakeTensorMode():
        yield lambda device: torch.empty(2, device=device)


def test_all_on_one_gpu(on):
    assert _gpu_index(NAMES, (on("cuda:1"), on("cuda:1"), on("cuda:1"), [on("cuda:1"), on("cuda:1")])) == 1
    assert _gpu_index(NAMES, (on("cuda:0"), None, on("cpu"), [])) == 0


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (("cuda:0", "cpu"), "got anchor on cpu and x on cuda:0"),
        (("cpu", "cuda:0"), "got x on cpu and anchor on cuda:0"),
        (("cuda:0", "cuda:1"), "got anchor on cuda:1 and x on cuda:0"),
    ],
)
def test_two_places_are_refused(on, devices, said):
    with pytest.raises(ValueError, match=f"expected all tensors on one GPU, {said}"):
        _gpu_index(NAMES, (*map(on, devices), on("cpu"), []))


def test_a_list_is_looked_into(on):
    with pytest.raises(ValueError, match="got tensors on cpu and x on cuda:0"):
        _gpu_index(NAMES, (on("cuda:0"), on("cuda:0"), on("cpu"), [on("cuda:0"), on("cpu")]))


def test_small_lists_may_lie_on_the_host_but_not_on_another_gpu(on):
    with pytest.raises(ValueError, match="got grid on cuda:1 and x on cuda:0"):
        _gpu_index(NAMES, (on("cuda:0"), on("cuda:0"), on("cuda:1"), []))


def test_offsets_of_videos_lie_where_the_tokens_lie():
    """A grid is on the host; the centres' sequences, one per video, must not be."""
    grid = torch.tensor([[1, 2, 2], [2, 1, 2]])
    module = importlib.import_module("vidtok.ops.adjacent_similarity")
    assert module._one_per_video(grid, torch.device("meta")).is_meta
    found = module._one_per_video(grid, torch.device("cpu"))
    assert found.dtype is torch.int32 and found.tolist() == [0, 4, 8]
