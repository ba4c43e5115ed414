"""Names of the operators and backends that have tables."""

from __future__ import annotations

import importlib
from types import ModuleType

BACKENDS = ("cuda", "triton")
DTYPES = ("float32", "bfloat16", "float16")
OPERATORS = (
    "adjacent_similarity",
    "attention_topk",
    "bipartite",
    "cluster_dpc_knn",
    "contour_select",
    "plan_apply",
    "pool_packed",
    "position_remap",
    "topk_select",
)


def module(op: str) -> ModuleType:
    """The file of one operator."""
    if op not in OPERATORS:
        raise ValueError(f"expected an operator among {', '.join(OPERATORS)}, got {op}")
    return importlib.import_module(f"vidtok.kernels.tables.{op}")


def dtypes(op: str, sm: int) -> tuple[str, ...]:
    """Dtypes that an operator's tables tell apart on an SM."""
    if op in ("position_remap", "topk_select"):
        return ("float32",)
    return DTYPES if sm >= 80 else ("float32", "float16")


def named_dtype(op: str, dtype: str) -> str:
    """The dtype under which a table lists a call: operators that only move or compare list every dtype alike."""
    if op in ("position_remap", "topk_select"):
        return "float32"
    if dtype not in DTYPES:
        raise ValueError(f"{op}: expected a dtype among {', '.join(DTYPES)}, got {dtype}")
    return dtype


def shapes(op: str, dtype: str) -> list[dict[str, int]]:
    """The shapes that tables hold, for one dtype."""
    size = 4 if dtype == "float32" else 2
    return [{**shape, "itemsize": size} if "itemsize" in shape else dict(shape) for shape in module(op).SHAPES]


def backends(sm: int) -> tuple[str, ...]:
    """Backends that serve an SM."""
    return BACKENDS if sm >= 80 else ("cuda",)
