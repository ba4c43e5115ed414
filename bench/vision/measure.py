"""What is measured of one tower: the plain one, the attached ones and the published algorithm take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import clock
from bench.baselines import tome
from bench.decoder.measure import ratios, seconds
from bench.row import Row
from bench.vision.model import DTYPES, MERGES, Shape, build, images, twin

#: Rounds of the sides of a case: at least, and at most.
ROUNDS = (2, 25)

#: The r at which the two forms of log(size) are compared.
FORM_AT = 8


@dataclass(frozen=True)
class Case:
    """A tower, a batch, a dtype, about how long its rounds may take, the merges, and whether all sides are there."""

    shape: Shape
    batch: int
    dtype: str
    seconds: float
    merges: tuple[int, ...] = MERGES
    every: bool = True

    def __str__(self) -> str:
        return f"{self.shape.name}, batch {self.batch}, {self.dtype}"


class Rows:
    """Makes rows of the CSV and prints them."""

    def __init__(self, shared: dict[str, Any], tiny: bool) -> None:
        self.shared, self.tiny = shared, tiny

    def row(self, case: str, label: str, unit: str, values: tuple[float, ...], count: int, **more: Any) -> Row:
        """A row; ``bound`` with ``upper`` makes its target."""
        bound, upper = more.pop("bound", None), more.pop("upper", False)
        target = reached = ""
        if bound is not None and not self.tiny:
            target = f"{'≤' if upper else '≥'} {bound:.3g}"
            met = values[1] <= bound if upper else values[1] >= bound
            reached = "yes" if met else f"no: {values[1]:.3g}"
        made = Row(
            "model", unit, "vision", case, "", "vidtok", label, *values, count, target=target, reached=reached,
            **more, **self.shared,
        )  # fmt: skip
        print(
            f"  {case}: {label} {values[1]:.4g} {unit}{f' (target {target}: {reached})' if target else ''}", flush=True
        )
        return made


def rounds(
    sides: dict[str, Callable[[], Any]], budget: float, device: torch.device, bounds: tuple[int, int] = ROUNDS
) -> dict[str, list[float]]:
    """Times of each side, which take turns until the budget is spent; who begins changes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    start = clock.now()
    for done in range(bounds[1]):
        if done >= bounds[0] and (clock.now() - start) * 1e-9 * (done + 1) / done > budget:
            break
        for name in order:
            times[name].append(seconds(sides[name], device))
        order.reverse()
    return times


def gate(case: Case, sides: dict[str, Callable[[], Any]], attached: dict[int, Any], r: int) -> None:
    """The attached tower merges as many tokens as the published algorithm, and gives nearly the same."""
    ours, theirs = sides[f"vidtok {r}"]().float(), sides[f"published {r}"]().float()
    expected = case.shape.tokens - sum(case.shape.merges(r))
    size = attached[r].vision[0].size
    if size is None or size.shape[-1] != expected or not torch.all(size.sum(-1) == case.shape.tokens):
        raise AssertionError(f"expected sizes of {expected} tokens that sum to {case.shape.tokens}, got {size}")
    # In half precision scores tie, and ties are broken otherwise.
    least = 0.999 if case.dtype == "fp32" else 0.9
    cosine = torch.nn.functional.cosine_similarity(ours, theirs).min()
    if not cosine >= least:
        raise AssertionError(f"expected the published result for {case}, r={r}, got one with a cosine of {cosine:.4f}")


def measure(case: Case, rows: Rows, device: torch.device, compiled: bool = False) -> list[Row]:
    """Every row of one case."""
    import vidtok

    plain = build(case.shape, device, DTYPES[case.dtype])
    pixels = images(case.shape, case.batch, device, DTYPES[case.dtype])
    sides: dict[str, Callable[[Tensor], Any]] = {"plain": lambda x: plain(x).pooler_output}
    attached: dict[int, Any] = {}
    held: list[Any] = []
    for r in case.merges:
        model = twin(plain)
        attached[r] = vidtok.attach(model, vision=f"tome:r={r}")
        sides[f"vidtok {r}"] = lambda x, model=model: model(x).pooler_output
        if r:
            sides[f"published {r}"] = lambda x, r=r: tome.tower(plain, x, r)
            if case.every:
                sides[f"careful {r}"] = lambda x, r=r: tome.tower(plain, x, r, fused=True)
                sides[f"cut {r}"] = lambda x, r=r: tome.cut(plain, x, r)
            if case.every and r == FORM_AT:
                model = twin(plain)
                # The other form of log(size) than the one that is chosen.
                form = "channel" if device.type == "cpu" else "mask"
                held.append(vidtok.attach(model, vision=f"tome:r={r},form={form}"))
                sides[f"{form} {r}"] = lambda x, model=model: model(x).pooler_output
    if compiled:
        sides.update(compile_sides(plain, case))
    with torch.inference_mode():
        for run in sides.values():
            run(pixels[:1])
        first = next(r for r in case.merges if r)
        gate(case, {name: lambda run=run: run(pixels[:1]) for name, run in sides.items()}, attached, first)
        times = rounds({n: lambda run=run: run(pixels) for n, run in sides.items()}, case.seconds, device)
    out = []
    for r in case.merges:
        out += compared(case, r, times, rows)
    for handle in [*attached.values(), *held]:
        handle.restore()
    return out


def compile_sides(plain: Any, case: Case) -> dict[str, Callable[[Tensor], Any]]:
    """The plain tower and the published algorithm under ``torch.compile``."""
    whole = torch.compile(lambda x: plain(x).pooler_output)
    out: dict[str, Callable[[Tensor], Any]] = {"compiled plain": whole}
    for r in case.merges:
        if r:
            out[f"compiled {r}"] = torch.compile(lambda x, r=r: tome.tower(plain, x, r))
    return out


def compared(case: Case, r: int, times: dict[str, list[float]], rows: Rows) -> list[Row]:
    """The rows of one r."""
    name, ours = f"{case}, r={r}", times[f"vidtok {r}"]
    n, ideal = len(ours), case.shape.ideal(r)
    speedup = ratios(times["plain"], ours)
    made = [
        rows.row(
            name, "speed-up", "×", speedup, n, bound=1.0 if r else None, flops=case.batch * case.shape.flops(r),
            speedup=ideal,
        )
    ]  # fmt: skip
    if r:
        made.append(rows.row(name, "of the ideal", "×", tuple(s / ideal for s in speedup), n, bound=0.92))
    others = (("published", 1.15), ("careful", None), ("compiled", None), ("channel", None), ("mask", None))
    for side, bound in others:
        if f"{side} {r}" in times:
            made.append(rows.row(name, f"over {side}", "×", ratios(times[f"{side} {r}"], ours), n, bound=bound))
    if f"cut {r}" in times:
        made.append(rows.row(name, "of cutting", "×", ratios(times[f"cut {r}"], ours), n))
    if r == 0 and "compiled plain" in times:
        made.append(rows.row(name, "over compiled plain", "×", ratios(times["compiled plain"], ours), n))
    return made
