"""The matrix tiles that CUDA kernels share: registers as PTX lays them out, and products of ragged rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidtok.kernels import cuda

SM = cuda.extension().build_info()["sms"][0]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if SM >= 80 else [])
TILES = [(32, 4), (64, 4), (64, 8), (128, 8)]


@pytest.fixture(autouse=True, params=(0, 1, 3), ids=("forward", "backward", "shuffled"))
def order(request):
    cuda.extension().set_order(request.param)
    yield
    cuda.extension().set_order(0)


def random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The PTX manual on mma.m16n8k16 with 16-bit inputs: groupID = lane >> 2, threadID = lane % 4.
def a_place(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)


def b_place(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane // 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane // 4 if i < 2 else lane // 4 + 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_mma_as_ptx_defines_it(dtype):
    a, b = random(0, 16, 16, dtype=dtype), random(1, 8, 16, dtype=dtype)
    c = random(2, 32, 4, dtype=torch.float32)
    a_words, b_words = torch.empty(32, 4, dtype=torch.int32), torch.empty(32, 2, dtype=torch.int32)
    d = torch.empty(32, 4)
    status = cuda.extension().run_mma(
        dtype is torch.bfloat16, *(t.data_ptr() for t in (a, b, c, a_words, b_words, d)), *cuda.launch(c)
    )
    cuda.check(status, "mma", a)
    product = a.double() @ b.double().T
    for lane in range(32):
        held_a, held_b = a_words[lane].view(dtype), b_words[lane].view(dtype)
        assert [held_a[i].item() for i in range(8)] == [a[a_place(lane, i)].item() for i in range(8)]
        assert [held_b[i].item() for i in range(4)] == [b.T[b_place(lane, i)].item() for i in range(4)]
        for i in range(4):
            assert abs(d[lane, i].item() - product[c_place(lane, i)].item() - c[lane, i].item()) < 1e-5


def test_wmma_multiplies_rows():
    a, b = random(0, 16, 16, dtype=torch.float16), random(1, 16, 16, dtype=torch.float16)
    out = torch.empty(16, 16)
    cuda.check(cuda.extension().run_wmma(a.data_ptr(), b.data_ptr(), out.data_ptr(), *cuda.launch(a)), "wmma", a)
    torch.testing.assert_close(out, (a.double() @ b.double().T).float(), rtol=1e-5, atol=1e-5)


def gram(a: Tensor, b: Tensor, rows: int, cols: int, tile: int, warps: int, stages: int, index=None, same=False):
    out, most = torch.full((tile, tile), float("nan")), torch.full((tile,), float("nan"))
    status = cuda.extension().run_gram(
        cuda.DTYPE_CODE[a.dtype], a.data_ptr(), b.data_ptr(), a.stride(0), b.stride(0), rows, cols, a.shape[1],
        cuda.pointer(index), same, tile, warps, stages, out.data_ptr(), most.data_ptr(), *cuda.launch(a),
    )  # fmt: skip
    cuda.check(status, "gram", a)
    return out, most


def expected(a: Tensor, b: Tensor, rows: int, cols: int, tile: int) -> Tensor:
    out = torch.zeros(tile, tile)
    out[:rows, :cols] = (a[:rows].double() @ b[:cols].double().T).float()
    return out


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(("tile", "warps"), TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_ragged_rows(dtype, tile, warps, stages):
    """Any number of rows and channels, strides with and without 16-byte accesses."""
    stages = min(stages, 2 if SM < 80 else 3 if tile == 128 else 4)
    shapes = ((tile, tile, 128, 128), (tile - 5, 3, 77, 77), (1, tile, 40, 48), (2, 2, 0, 8))
    for rows, cols, channels, stride in shapes:
        a = random(rows, tile, stride, dtype=dtype)[:, :channels]
        b = random(cols, tile, stride, dtype=dtype)[:, :channels]
        out, most = gram(a, b, rows, cols, tile, warps, stages)
        torch.testing.assert_close(out, expected(a, b, rows, cols, tile), rtol=1e-5, atol=1e-4)
        assert torch.equal(most, out.max(1).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_have_the_same_bits_wherever_their_rows_stand(dtype):
    """In every tile, pipeline and place, gathered or not, and for (i, j) as for (j, i)."""
    x = random(5, 32, 200, dtype=dtype)
    plain, _ = gram(x, x, 32, 32, 32, 4, 1)
    assert torch.equal(plain, plain.T)
    assert torch.equal(gram(x, x, 32, 32, 32, 4, 2, same=True)[0], plain)
    for tile, warps in TILES:
        assert torch.equal(gram(x, x, 32, 32, tile, warps, 2)[0][:32, :32], plain)
    index = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    assert torch.equal(gram(x, x, 32, 32, 32, 4, 2, index=index)[0], plain[index.long()])
