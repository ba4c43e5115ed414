"""The guard pages and the poison catch what they are for."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.guard import guarded, poisoned_allocation

PROGRAM = """
import ctypes, torch
from tests.guard import guarded
t = guarded(torch.arange(5, dtype=torch.int32), {at!r})
start = t.data_ptr() + ({offset})
print(ctypes.string_at(start, 1) is not None, flush=True)
"""


@pytest.mark.parametrize(("at", "inside", "outside"), [("end", 19, 20), ("begin", 0, -1)])
def test_access_beyond_the_buffer_ends_the_process(at, inside, outside):
    root = Path(__file__).parents[1]
    for offset, code in ((inside, 0), (outside, -signal.SIGSEGV)):
        program = PROGRAM.format(at=at, offset=offset)
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True)
        assert done.returncode == code, done.stderr.decode()


def test_guarded_copy_is_equal():
    x = torch.randn(7, 5)
    assert torch.equal(guarded(x, "end"), x) and torch.equal(guarded(x, "begin"), x)


def test_poison_shows_what_was_not_written():
    with poisoned_allocation("end"):
        assert torch.zeros(3).new_empty(2, 2).isnan().all()
        assert int(torch.zeros(3).new_empty(4, dtype=torch.int64).max()) < 0
    assert "new_empty" not in str(torch.Tensor.new_empty.__qualname__.split(".")[0])
