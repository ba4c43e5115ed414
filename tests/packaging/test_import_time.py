"""Importing vidtok is cheap, and works without its extension."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IMPORT = """
import time
import torch
start = time.process_time()
{statement}
print(time.process_time() - start)
"""

WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["vidtok._C"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import vidtok
    from vidtok import ops, Plan
    index, whole, kept = (torch.tensor(v, dtype=torch.int32) for v in ([0, 2], [0, 3], [0, 2]))
    plan = Plan.gather(index, whole, kept, 3)
    rows = ops.plan_apply(plan, torch.arange(6.0).view(3, 2))
print(rows.tolist())
for w in caught:
    if "vidtok" in str(w.message):
        print("warning:", w.message)
"""


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", ["import vidtok", "import vidtok, vidtok.ops, vidtok.spec; vidtok.Plan"])
def test_import_costs_little_beyond_torch(statement: str) -> None:
    # CPU time, the best of three: the machine may be busy, and the first run compiles byte code.
    seconds = min(float(python(IMPORT.format(statement=statement))) for _ in range(3))
    assert seconds < 0.3


def test_import_without_transformers() -> None:
    assert "ok" in python("import sys, vidtok, vidtok.ops; assert 'transformers' not in sys.modules; print('ok')")


def test_without_extension_the_reference_serves_with_one_warning() -> None:
    lines = python(WITHOUT_EXTENSION, VIDTOK_BACKEND="auto").splitlines()
    assert lines[0] == "[[0.0, 1.0], [4.0, 5.0]]"
    warnings = [line for line in lines if line.startswith("warning:")]
    assert len(warnings) == 1, lines
    assert "extension is missing" in warnings[0] and "C++17 compiler" in warnings[0]
