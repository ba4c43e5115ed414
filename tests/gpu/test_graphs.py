"""Where counts follow from shapes, a whole block and a whole reduction become a CUDA graph that replays right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vidtok import methods, ops

GRID = [(4, 14, 14), (4, 14, 14)]


class ToMeBlock(nn.Module):
    """A ViT block with merging between attention and MLP, as ToMe places it."""

    def __init__(self, width: int = 256, heads: int = 4, r: int = 16) -> None:
        super().__init__()
        self.heads, self.r = heads, r
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, size: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = None if size is None else size.log()[:, None, None].to(q.dtype)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(b, t, c))
        x, size, _ = ops.bipartite_merge(x, k, self.r, size=size, protected=1)
        return x + self.mlp(self.norm2(x)), size


def captured(run, inputs):
    """The graph of ``run`` on copies of the inputs, and the tensors that it reads and writes."""
    held = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held)
    return graph, held, out


def check_replays(run, draw):
    graph, held, out = captured(run, draw(0))
    for seed in (1, 2, 3):
        fresh = draw(seed)
        for to, new in zip(held, fresh):
            to.copy_(new)
        for t in out:
            t.fill_(0)
        graph.replay()
        for a, b in zip(out, run(*fresh)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_tome_blocks(backend, device, dtype):
    torch.manual_seed(0)
    blocks = [ToMeBlock().to(device, dtype).eval() for _ in range(2)]

    def run(x):
        size = None
        for block in blocks:
            x, size = block(x, size)
        return x, size

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [torch.randn(8, 197, 256, device=device, dtype=dtype, generator=generator)]

    with torch.no_grad():
        check_replays(run, draw)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("uniform", {"ratio": 0.25}),
        ("random", {"ratio": 0.25}),
        ("evs", {"ratio": 0.5}),
        ("tome", {"ratio": 0.5}),
        ("pool", {"level": 2}),
    ],
)
def test_a_reduction_at_the_language_models_input(backend, device, name, options):
    n, length = 4 * 196, 900
    columns = torch.cat([torch.arange(10, 10 + n), torch.arange(length + 20, length + 20 + n)]).to(device)
    cu = (torch.arange(3, dtype=torch.int32) * length).to(device)

    def run(rows, position, mask):
        features = rows.reshape(-1, rows.shape[-1])[columns]
        plan = getattr(methods, name)(features, GRID, **options)
        left = length - n + plan.num_out // 2
        lifted = plan.lift(columns, cu, dense=True, lengths=([length] * 2, [left] * 2))
        return ops.plan_apply(lifted, rows), *ops.position_remap(lifted, position, mask)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        rows = torch.randn(2, length, 512, device=device, dtype=torch.float16, generator=generator)
        position = torch.randint(0, 999, (3, 2, length), device=device, generator=generator)
        return [rows, position, torch.ones(2, length, dtype=torch.bool, device=device)]

    with torch.no_grad():
        check_replays(run, draw)


def test_attention_topk(backend, device):
    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.randn(1, 28, 1, 128, device=device, dtype=torch.float16, generator=generator),
            torch.randn(1, 4, 6400, 128, device=device, dtype=torch.float16, generator=generator),
        ]

    check_replays(lambda q, k: ops.attention_topk(q, k, 640, span=[(0, 100, 6300)]), draw)


def test_capture_before_a_first_call_says_so(backend, device):
    """Lists are uploaded by the first call; a capture without one raises a sentence instead of a CUDA error."""
    x = torch.randn(6 * 35, 64, device=device)
    ops.pool_packed(x, [(3, 7, 10)], out_hw=(2, 2))  # kernels are loaded, which a capture does not allow either
    sides = (6, 5, 7) if backend == "cuda" else (6, 7, 5)
    with (
        pytest.raises(RuntimeError, match="before the capture of a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.pool_packed(x, [sides], out_hw=(2, 2))
    torch.cuda.synchronize()
