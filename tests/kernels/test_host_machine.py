"""The machine that runs CUDA kernels on the host: it must pass what is legal and catch what is broken."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.guard import guarded
from vidtok.kernels import cuda

N = 64
ORDERS = (0, 1, 2, 3, 4)
LEGAL = ("reverse", "one_warp_shuffles", "half_mask", "async", "scan")
# The sentence the machine says of each fault that a GPU would answer with a hang or a wrong number.
REPORTED = {
    "shared_too_small": "lies outside the 256 bytes of shared memory asked for",
    "divergent_shuffle": "has exited|deadlock",
    "shuffle_against_barrier": "deadlock: of 64 threads 0 exited, 32 wait at a barrier and 32 for their warp",
    "outside_mask": "is not in mask 0000ffff of its own call",
    "reads_outside_mask": "which mask 0000ffff leaves out",
    "two_shuffles": "the warp diverged",
    "two_barriers": "waits at the barrier",
    "early_exit": "deadlock: of 64 threads 32 exited, 32 wait at a barrier",
}
WRONG_NUMBERS = ("missing_barrier", "missing_wait", "early_wait", "unwritten")


@pytest.fixture(autouse=True)
def forward_again():
    yield
    cuda.extension().set_order(0)


def run(sample: str, order: int, x: torch.Tensor | None = None) -> torch.Tensor:
    x = torch.arange(N).float() if x is None else x
    out = torch.full((N,), float("nan"))
    cuda.extension().set_order(order)
    status = cuda.extension().run_sample(sample, x.data_ptr(), out.data_ptr(), N, *cuda.launch(x))
    cuda.check(status, sample, x)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sample", LEGAL)
def test_legal_kernels_pass(sample, order):
    assert torch.equal(run(sample, order), torch.arange(N).float().flip(0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sample", REPORTED)
def test_faults_are_reported(sample, order):
    with pytest.raises(RuntimeError, match=REPORTED[sample]):
        run(sample, order)


@pytest.mark.parametrize("sample", WRONG_NUMBERS)
def test_faults_show_in_the_numbers(sample):
    """Poisoned shared memory, copies that happen at the wait and poisoned outputs leave NaN behind in every order."""
    if cuda.extension().build_info()["sms"][0] < 80 and sample in ("missing_wait", "early_wait"):
        assert torch.equal(run(sample, 0), torch.arange(N).float().flip(0))  # sm_70 has no copies to wait for
        return
    for order in ORDERS:
        assert run(sample, order).isnan().any()


def test_a_race_gives_different_numbers_in_different_orders():
    assert len({run("race", order)[0].item() for order in ORDERS}) > 1


CHILD = """
import torch
from tests.kernels.test_host_machine import run, N, guarded
out = run({sample!r}, 0, guarded(torch.arange(N).float(), "end"))
print("same" if torch.equal(out, torch.arange(N).float().flip(0)) else "differs")
"""


@pytest.mark.parametrize("sample", ["off_by_one", "shared_off_by_one"])
def test_reads_outside_a_buffer_are_caught(sample):
    """A guard page ends the process, AddressSanitizer ends it with a report, poison gives a wrong number."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(sample=sample)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode != 0 or child.stdout.strip() == "differs", (child.stdout, child.stderr)
    if "san" in os.environ["VIDTOK_CUDA_MODULE"] or "address" in os.environ["VIDTOK_CUDA_MODULE"]:
        assert "AddressSanitizer" in child.stderr or sample == "off_by_one", child.stderr


def test_the_reading_child_sees_nothing_wrong_with_a_legal_kernel():
    assert torch.equal(run("reverse", 0, guarded(torch.arange(N).float(), "end")), torch.arange(N).float().flip(0))


def test_an_unknown_sample_is_an_error():
    with pytest.raises(ValueError, match="expected the name of a sample, got nothing"):
        run("nothing", 0)


def test_a_launch_says_what_the_table_allows():
    """The shared memory of the forced SM's table holds on the host too."""
    x = torch.zeros(1)
    status = cuda.extension().run_sample("reverse", x.data_ptr(), x.data_ptr(), 1 << 20, *cuda.launch(x))
    with pytest.raises(RuntimeError, match="expected whole warps of at most 1024 threads"):
        cuda.check(status, "reverse", x)


def test_a_switch_of_fibers_is_cheap():
    """A generous ceiling: a system call per switch would take ten times as long without sanitizers."""
    import time

    on = cuda.launch(torch.zeros(1))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        cuda.extension().switch_fibers(2000, *on)
        best = min(best, (time.perf_counter() - start) / 2000 / 32)
    assert best < 2e-6
