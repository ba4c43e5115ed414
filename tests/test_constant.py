"""Lists on a GPU are uploaded once and shared: other streams wait for the upload. Stubs stand for the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vidtok import _constant

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, number):
        self.cuda_stream, self.waited = number, []

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def gpu(monkeypatch):
    """Uploads from stream 1; ``gpu.stream`` is the current one."""
    used = []
    tensor = SimpleNamespace(is_cuda=True, device=GPU, record_stream=used.append)
    here = SimpleNamespace(stream=Stream(1), capturing=False, used=used, tensor=tensor)
    here.stream.record_event = lambda: "uploaded"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: here.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: here.stream.cuda_stream, raising=False)
    held = _constant._Uploaded(tensor)
    monkeypatch.setattr(_constant, "_upload", lambda *_: held)
    monkeypatch.setattr(_constant, "_captured", [])
    return here


def test_another_stream_waits_once(gpu):
    first = gpu.stream
    assert _constant.shared([1, 2], torch.int64, GPU) is gpu.tensor
    gpu.stream = Stream(2)
    for _ in range(2):
        assert _constant.shared([1, 2], torch.int64, GPU) is gpu.tensor
    assert gpu.stream.waited == ["uploaded"] and gpu.used == [gpu.stream] and first.waited == []


def test_a_capture_waits_for_nothing_and_keeps_the_list(gpu):
    gpu.stream, gpu.capturing = Stream(3), True
    _constant.shared([1, 2], torch.int64, GPU)
    assert gpu.stream.waited == [] and _constant._captured == [gpu.tensor]


def test_what_a_capture_reads_of_a_cache_is_kept(gpu):
    assert _constant.held("plan") == "plan" and _constant._captured == []
    gpu.capturing = True
    assert _constant.held("plan") == "plan" and _constant._captured == ["plan"]


def test_a_first_upload_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph, got none"):
        _constant._upload((31, 7), torch.int64, GPU)


def test_numbers_on_the_cpu():
    a, b = (_constant.constant([3, 4], torch.int32) for _ in range(2))
    assert a.tolist() == [3, 4] and a.dtype is torch.int32 and a is not b
