"""The CUDA kernels' less common paths: shapes larger than the shared cases', so that strips, splits, several launches
and ragged ends occur, each with the first and the last knobs that its table allows."""

from __future__ import annotations

import pytest
import torch

import vidtok
from tests.cases import Case, Make, merged_plan
from tests.ops.test_contract import assert_same
from vidtok import ops
from vidtok.kernels import cuda, tables

SM = int(cuda.extension().build_info()["sms"][0])


def case(op: str, name: str, make, shape: dict[str, int], decides: bool = True):
    return pytest.param(Case(op, name, make, decides), shape, id=f"{op} {name}")


def riders(m: Make):
    plan = merged_plan(m, 400, 130)
    return (plan, *[m.exact(400, 3 + i) for i in range(9)], *[m.ints(9, 400) for _ in range(9)]), {"dim": 0}


CASES = [
    case(
        "bipartite_merge",
        "300 tokens",
        lambda m: ((m.exact(2, 300, 72), m.exact(2, 300, 64), 40), {"protected": 1}),
        {"batch": 2, "tokens": 300, "dim": 64, "channels": 72, "heads": 1},
    ),
    case(
        "bipartite_merge",
        "150 tokens, heads",
        lambda m: ((m.exact(2, 150, 72), m.exact(2, 2, 150, 32), 75), {}),
        {"batch": 2, "tokens": 150, "dim": 32, "channels": 72, "heads": 2},
    ),
    case(
        "attention_topk",
        "one row of 1500 keys",
        lambda m: ((m.exact(1, 8, 1, 64), m.exact(1, 2, 1500, 64), 300), {"span": [(0, 7, 700), (0, 720, 1490)]}),
        {"length": 1500, "q_heads": 8, "kv_heads": 2, "dim": 64, "rows": 1},
        False,
    ),
    case(
        "attention_topk",
        "20 causal rows",
        lambda m: (
            (m.exact(1, 4, 20, 32), m.exact(1, 2, 700, 32), 90),
            {"span": [(0, 3, 600)], "query_position": torch.arange(600, 620)[None], "reduce": "max"},
        ),
        {"length": 700, "q_heads": 4, "kv_heads": 2, "dim": 32, "rows": 20},
        False,
    ),
    case(
        "attention_topk",
        "9000 keys",
        lambda m: ((m.exact(1, 4, 1, 8), m.exact(1, 1, 9000, 8), 4100), {"span": [(0, 30, 9000)]}),
        {"length": 9000, "q_heads": 4, "kv_heads": 1, "dim": 8, "rows": 1},
        False,
    ),
    case(
        "attention_topk",
        "two rows of 9000 keys",
        lambda m: ((m.exact(2, 2, 1, 8), m.exact(2, 1, 9000, 8), 9), {"span": [(0, 0, 9000), (1, 7, 8900)]}),
        {"length": 9000, "q_heads": 2, "kv_heads": 1, "dim": 8, "rows": 1},
        False,
    ),
    case(
        "cluster_dpc_knn",
        "segments of 150, 0, 60 and 200",
        lambda m: (
            (m.exact(410, 96), torch.tensor([40, 0, 60, 9])),
            {"k": 7, "cu_seqlens": m.offsets(150, 0, 60, 200)},
        ),
        {"segments": 4, "longest": 200, "channels": 96},
    ),
    case(
        "topk_select",
        "20000 scores",
        lambda m: ((m.exact(20000, levels=100), [0, 3000, 1]), {"cu_seqlens": m.offsets(5, 19000, 995)}),
        {"segments": 3, "longest": 19000},
    ),
    case(
        "plan_apply",
        "mean of 400",
        lambda m: ((merged_plan(m, 400, 130), m.exact(400, 136)), {}),
        {"rows": 130, "channels": 136, "itemsize": 4},
    ),
    case("position_remap", "18 riders", riders, {"rows": 130, "tensors": 18, "bytes": 700}),
    case(
        "pool_packed",
        "two grids",
        lambda m: ((m.exact(3 * 14 * 10 + 49, 72), [(3, 14, 10), (1, 7, 7)]), {"level": 3}),
        {"rows": 49, "channels": 72, "itemsize": 4},
    ),
    case(
        "adjacent_similarity",
        "previous",
        lambda m: ((m.exact(8 * 30, 264), [(8, 5, 6)]), {}),
        {"tokens": 240, "channels": 264},
    ),
    case(
        "adjacent_similarity",
        "windows",
        lambda m: ((m.exact(8 * 30, 264), [(8, 5, 6)]), {"to": "window", "window": [1, 5, 2]}),
        {"tokens": 240, "channels": 264},
    ),
    case(
        "contour_select",
        "60 frames",
        lambda m: ((m.normal(60, 48), 11), {"query": m.normal(48)}),
        {"sequences": 1, "longest": 60, "rank": 15, "channels": 48},
        False,
    ),
]


def accepted(op: str, dtype: torch.dtype, shape: dict[str, int]) -> list[dict[str, int]]:
    """The first and the last knobs that the table's candidates allow on this SM."""
    name = "bipartite" if op.startswith("bipartite") else op
    found = tables.module(name).candidates("cuda", tables.GPUS[SM], str(dtype).removeprefix("torch."), shape)
    fitting = [c.knobs for c in found if c.rejected is None]
    return [fitting[0], fitting[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("case", "shape"), CASES)
def test_equals_reference(case, shape, dtype):
    args, kwargs = case.make(Make(dtype))
    with vidtok.use_backend("reference"):
        expected = case.call(args, kwargs)
    name = "bipartite" if case.op.startswith("bipartite") else case.op
    for knobs in accepted(case.op, dtype, shape):
        with vidtok.use_backend("cuda"), tables.forced("cuda", name, knobs) as imposed:
            got = case.call(args, kwargs)
        assert imposed.asked, "the kernel did not ask its table"
        try:
            assert_same(case, got, expected, dtype)
            if case.op == "attention_topk":
                check_selection(got, kwargs["span"], args[2])
        except AssertionError as error:
            raise AssertionError(f"with {knobs}: {error}") from error


def check_selection(got, span, keep) -> None:
    """The chosen indices are the best of the scores that came with them."""
    start = 0
    chosen = []
    for _, begin, end in span:
        score = got.score[start : start + end - begin]
        start += end - begin
        with vidtok.use_backend("reference"):
            chosen.append(ops.topk_select(score, keep) + begin)
    assert torch.equal(got.index, torch.cat(chosen))


# A sequence of 260 tokens fits one block; sm_70's table may find its 96 KiB too few for it.
FITS = 1 if SM >= 80 else 2


@pytest.mark.parametrize(
    ("most", "call"),
    [
        (FITS, lambda m: ops.bipartite_merge(m.exact(2, 197, 72), m.exact(2, 197, 64), 16, protected=1)),
        (FITS, lambda m: ops.bipartite_merge(m.exact(1, 260, 72), m.exact(1, 2, 260, 32), 16)),
        (2, lambda m: ops.bipartite_merge(m.exact(2, 577, 72), m.exact(2, 577, 64), 16, protected=1)),
        (1, lambda m: ops.plan_apply(merged_plan(m, 400, 130), m.exact(400, 40))),
        (1, lambda m: ops.position_remap(merged_plan(m, 9, 4), *[m.exact(9) for _ in range(12)])),
        (1, lambda m: ops.pool_packed(m.exact(64, 40), [(1, 4, 4), (2, 4, 5), (1, 2, 4)], level=2)),
        (1, lambda m: ops.adjacent_similarity(m.exact(64, 40), [(2, 4, 4), (2, 4, 4)])),
        (1, lambda m: ops.topk_select(m.exact(3000), [5, 900], cu_seqlens=m.offsets(1000, 2000))),
        (4, lambda m: ops.attention_topk(m.exact(1, 8, 1, 64), m.exact(1, 2, 900, 64), 9, span=[(0, 0, 900)])),
        (7, lambda m: ops.cluster_dpc_knn(m.exact(90, 40), 9, k=5, cu_seqlens=m.offsets(30, 40, 20))),
    ],
    ids=["197 tokens", "260 tokens", "577 tokens", "plan_apply", "12 riders", "3 grids", "2 videos", "2 segments",
         "attention_topk", "3 segments clustered"],
)  # fmt: skip
def test_launches(most, call):
    """One-block sequences, all riders and all grids take one launch; nothing grows with the number of parts."""
    before = cuda.extension().launches()
    with vidtok.use_backend("cuda"):
        call(Make(torch.float16))
    assert 1 <= cuda.extension().launches() - before <= most
