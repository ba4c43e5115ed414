"""Where counts follow from shapes, nothing is asked of the device: on a GPU that would wait, and forbid a capture."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidtok import methods, ops

GRID = [(4, 6, 6), (4, 6, 6)]
ASKING = ("nonzero", "_local_scalar_dense", "bincount", "equal", "is_nonzero", "_unique2", "masked_select", "item")


class Waits(TorchDispatchMode):
    """Collects what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        waits = name in ASKING
        # A number assigned by an index becomes a tensor on the CPU, which is uploaded.
        waits |= name in ("index_put_", "index_put") and args[2].dim() == 0
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        waits |= name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if waits:
            self.found.append(str(function))
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform", {"ratio": 0.25}),
        ("random", {"ratio": 0.25}),
        ("evs", {"ratio": 0.5}),
        ("dtd", {"threshold": 0.5, "relative": True}),
        ("tome", {"ratio": 0.3}),
        ("pool", {"level": 2}),
    ],
)
def test_a_reduction_asks_nothing(name, options):
    n, length = 4 * 36, 200
    rows = torch.randn(2 * length, 32)
    columns = torch.cat([torch.arange(10, 10 + n), torch.arange(length + 20, length + 20 + n)])
    cu = torch.arange(3, dtype=torch.int32) * length
    features = rows[columns]
    run = getattr(methods, name)
    run(features, GRID, **options)  # what is made once, and kept on a GPU
    with Waits() as waits:
        plan = run(features, GRID, **options)
        left = length - n + plan.num_out // 2
        lifted = plan.lift(columns, cu, dense=True, lengths=([length] * 2, [left] * 2))
        ops.plan_apply(lifted, rows)
        ops.position_remap(lifted, torch.arange(2 * length))
    assert not waits.found


def test_prunevid_asks_only_by_its_two_lists():
    """The clusters' counts are summed too, which lie on the host everywhere."""
    x = torch.randn(8 * 36, 32).repeat_interleave(2, 0)
    with Waits() as waits:
        methods.prunevid(x, [(16, 6, 6)])
    assert waits.found == ["aten._local_scalar_dense.default"] * 2
