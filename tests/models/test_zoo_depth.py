"""Every family with several layers behind a drop: what visual tokens see there reaches the answer."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny
from tests.models.test_zoo import TAKEN, family
from vidtok.models import attach

#: Families whose unreduced model answers otherwise with a static cache.
OTHERWISE = {"gemma4_unified"}


@pytest.mark.parametrize("name", [n for n in TAKEN if "uni" not in getattr(family(n), "REFUSED", {})])
@torch.no_grad()
def test_two_drops(name):
    """A ragged batch equals each row alone, also behind a second drop, and on a static cache."""
    module = family(name)
    first = getattr(module, "DROP_AT", 1)
    model, inputs = module.make(layers=first + 3), module.batch(module.ROWS)
    try:
        attach(model, decoder=f"uni_{first}_0.5-uni_{first + 1}_0.3").restore()
        spec = f"uni_{first}_0.5-uni_{first + 1}_0.3"
    except ValueError:  # later layers read the keys of the first ones
        spec = f"uni_{first}_0.5"
    with attach(model, decoder=spec):
        got, out = tiny.generate(model, inputs, 2)
        near = {"rtol": 0, "atol": 2e-5 * float(got.abs().max())}
        for i in range(len(module.ROWS)):
            alone, one = tiny.generate(model, module.row(inputs, module.ROWS, i), 2)
            assert torch.equal(one.sequences[0, -2:], out.sequences[i, -2:])
            torch.testing.assert_close(got[i : i + 1], alone, **near)
        if tiny.VERSION[0] > 4 and name not in OTHERWISE:
            static, _ = tiny.generate(model, inputs, 2, cache_implementation="static", disable_compile=True)
            torch.testing.assert_close(static, got, **near)
