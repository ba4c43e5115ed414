"""torch.compile without graph breaks on a GPU, with both backends."""

from __future__ import annotations

import pytest
import torch

from tests.cases import CASES, Make
from tests.gpu.test_operators import on
from tests.ops.test_contract import FIRST, leaves

DRAWN = [c for c in CASES if "empty" not in c.name]


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_without_graph_breaks(case, backend, device):
    torch._dynamo.reset()
    args, kwargs = on(case.make(Make(torch.float32)), device)
    expected = case.call(args, kwargs)
    got = torch.compile(lambda a, k: case.call(a, k), fullgraph=True, backend="aot_eager")(args, kwargs)
    for a, b in zip(leaves(got), leaves(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_with_inductor(case, backend, device):
    torch._dynamo.reset()
    args, kwargs = on(case.make(Make(torch.float16)), device)
    expected = case.call(args, kwargs)
    got = torch.compile(lambda a, k: case.call(a, k), fullgraph=True)(args, kwargs)
    for a, b in zip(leaves(got), leaves(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
