"""More than 2³¹ elements: offsets must be 64 bits wide everywhere."""

from __future__ import annotations

import pytest
import torch

from vidtok import ops
from vidtok.plan import Plan

ROWS, CHANNELS = 655_360, 3_584  # 2.35e9 elements
NEEDED = 14 << 30


pytestmark = pytest.mark.skipif(torch.cuda.mem_get_info()[0] < NEEDED, reason="needs 14 GiB of free GPU memory")


@pytest.fixture(scope="module")
def x(device):
    t = torch.empty(ROWS, CHANNELS, dtype=torch.bfloat16, device=device)
    t[:, :] = torch.arange(ROWS, device=device)[:, None] % 251
    t[:, 0] = 1
    return t


def ends(device, *counts):
    return [torch.tensor([0, n], dtype=torch.int32, device=device) for n in counts]


def test_plan_apply_reads_and_writes_past_2_31_elements(x, backend, device):
    index = torch.arange(ROWS - 1, -1, -1, device=device, dtype=torch.int32)
    y = ops.plan_apply(Plan.gather(index, *ends(device, ROWS, ROWS), ROWS), x)
    for m in (0, 1, ROWS // 2, ROWS - 2, ROWS - 1):
        assert torch.equal(y[m], x[ROWS - 1 - m])


def test_merge_past_2_31_elements(x, backend, device):
    half = ROWS // 2
    owner = torch.arange(ROWS, device=device) // 2
    plan = Plan.from_assignment(owner, 2 * torch.arange(half, device=device), *ends(device, ROWS, half), ROWS)
    y = ops.plan_apply(plan, x)
    for m in (0, half // 2, half - 1):
        torch.testing.assert_close(y[m], x[2 * m : 2 * m + 2].float().mean(0).bfloat16())


def test_position_remap_past_2_31_elements(x, backend, device):
    index = torch.tensor([ROWS - 1, 5], dtype=torch.int32, device=device)
    (y,) = ops.position_remap(Plan.gather(index, *ends(device, ROWS, 2), ROWS), x, dim=0)
    assert torch.equal(y, x[index.long()])


def test_pooling_and_similarity_past_2_31_elements(x, backend, device):
    frames = ROWS // 256
    grid = [(frames, 16, 16)]
    y, _ = ops.pool_packed(x, grid, level=16)
    torch.testing.assert_close(y[-1], x[-256:].float().mean(0).bfloat16(), rtol=1e-2, atol=0.5)
    score = ops.adjacent_similarity(x, grid)
    a, b = x[-1].double(), x[-257].double()
    torch.testing.assert_close(score[-1].double(), torch.dot(a, b) / a.norm() / b.norm(), rtol=0, atol=2**-12)
