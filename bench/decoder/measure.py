"""What is measured of one model: the attached side and the plain one take turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import clock
from bench.decoder.model import ATTENTION, UNIFORM, VISUAL_ID, Size, build, by_hand, prompt, text_only, twin
from bench.row import Row

WARM = 1


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock.now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock.now() - start) * 1e-9


def turns(sides: dict[str, Callable[[], Any]], count: int, device: torch.device) -> dict[str, list[float]]:
    """Times of each side; the sides take turns, and who begins changes."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(min(WARM, count)):
        for name in order:
            sides[name]()
    for _ in range(count):
        for name in order:
            times[name].append(seconds(sides[name], device))
        order.reverse()
    return times


def ratios(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of the ratios of pairs."""
    found = sorted(a / b for a, b in zip(above, below))
    return tuple(found[round(q * (len(found) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


class Bench:
    """The measurements on one machine; each returns rows."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, shared: dict[str, Any]) -> None:
        import vidtok

        self.attach = partial(vidtok.attach, visual_token_id=VISUAL_ID)
        self.size, self.device, self.dtype, self.shared = size, device, dtype, shared
        self.plain = build(size, device, dtype)
        self.other = twin(self.plain)
        self.inputs, self.text = prompt(size, device), text_only(size, device)

    def row(self, case: str, label: str, unit: str, values: tuple[float, float, float], count: int, **more: Any) -> Row:
        """A row of the CSV; ``bound`` with ``upper`` makes the target."""
        bound, upper = more.pop("bound", None), more.pop("upper", True)
        bound = None if self.size.tiny else bound
        target = reached = ""
        if bound is not None:
            target = f"{'≤' if upper else '≥'} {bound:g}{'' if unit == '×' else f' {unit}'}"
            met = values[1] <= bound if upper else values[1] >= bound
            reached = "yes" if met else f"no: {values[1]:.3g}"
        made = Row(
            "model", unit, "decoder", case, "", "vidtok", label, *values, count, target=target, reached=reached,
            **more, **self.shared,
        )  # fmt: skip
        print(f"  {case}: {values[1]:.4g} {unit}{f' (target {target}: {reached})' if target else ''}", flush=True)
        return made

    def prefill(self, model: Any) -> Any:
        """One prefill, as ``generate`` makes it."""
        return model(**self.inputs, use_cache=True, logits_to_keep=1)

    # ------------------------------------------------------------------ prefill
    def prefills(self, name: str, hand: bool = False, **where: Any) -> list[Row]:
        """Speed-up of a prefill against the ideal of its operations, and that of a loop by hand."""
        rows = []
        with self.attach(self.other, **where) as handle:
            out = self.prefill(self.other)
            report = handle.report()
            self.gate(report, out)
            ideal = report.flops_whole / report.flops
            sides = {"plain": lambda: self.prefill(self.plain), "vidtok": lambda: self.prefill(self.other)}
            if hand:
                sides["by hand"] = by_hand(self.plain, self.inputs["input_ids"], self.columns(report))
                near = 1e-3 if self.dtype == torch.float32 else 5e-2
                torch.testing.assert_close(sides["by hand"](), out.logits, rtol=near, atol=near)
            times = turns(sides, self.size.pairs, self.device)
        reached = ratios(times["plain"], times["vidtok"])
        n = len(times["plain"])
        rows.append(self.row(f"prefill, {name}", "speed-up", "×", reached, n, flops=float(report.flops)))
        share = tuple(r / ideal for r in reached)
        rows.append(
            self.row(f"of the ideal {ideal:.3g}×, {name}", "speed-up / ideal", "×", share, n, bound=0.9, upper=False)
        )
        if hand:
            rows.append(
                self.row(f"prefill by hand, {name}", "speed-up", "×", ratios(times["plain"], times["by hand"]), n)
            )
        return rows

    def gate(self, report: Any, out: Any) -> None:
        """The cache holds what the report says, and tokens have left."""
        held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        if [layer.kv_length for layer in report.layers] != held or report.kv_bytes_saved <= 0:
            raise AssertionError(f"expected caches of {[x.kv_length for x in report.layers]} columns, got {held}")

    def columns(self, report: Any) -> dict[int, Tensor]:
        """The columns that stay at each drop, counted in those that came."""
        visual = (self.inputs["input_ids"][0] == VISUAL_ID).nonzero().squeeze(1).cpu()
        length = self.inputs["input_ids"].shape[1]
        now, kept = torch.arange(length), {}
        for layer, plan in report.samples[0].stages:
            stay = torch.ones(length, dtype=torch.bool)
            stay[visual] = False
            stay[visual[plan.anchor.long()]] = True
            wanted = torch.arange(length)[stay]
            kept[layer] = torch.searchsorted(now, wanted).to(self.device)
            now = wanted
        return kept

    # ------------------------------------------------------------------ the rest
    def decode(self) -> list[Row]:
        """Decode steps after a reduced prefill against those after a whole one."""
        step = self.inputs["input_ids"][:, -1:]
        with self.attach(self.other, decoder=UNIFORM):
            caches = {"plain": self.prefill(self.plain), "vidtok": self.prefill(self.other)}
            models = {"plain": self.plain, "vidtok": self.other}
            caches = {name: out.past_key_values for name, out in caches.items()}
            length = self.inputs["input_ids"].shape[1]
            at = dict.fromkeys(caches, length)

            def one(name: str) -> None:
                # As generate() does: positions are the caller's.
                position = torch.full((1, 1), at[name], device=self.device)
                mask = torch.ones(1, at[name] + 1, dtype=torch.long, device=self.device)
                models[name](
                    input_ids=step, past_key_values=caches[name], position_ids=position, attention_mask=mask,
                    use_cache=True,
                )  # fmt: skip
                at[name] += 1

            times = turns({n: lambda n=n: one(n) for n in caches}, self.size.steps, self.device)
        ratio = ratios(times["vidtok"], times["plain"])
        return [
            self.row(f"decode step, {UNIFORM}", "time / plain", "×", ratio, len(times["plain"]), bound=1.0),
        ]

    def scoring(self) -> list[Row]:
        """Share of a prefill that goes into scores."""
        shares = []
        with self.attach(self.other, decoder=ATTENTION) as handle:
            for i in range(max(2, self.size.pairs)):
                self.prefill(self.other)
                times = handle.report().times
                if i:
                    shares.append(100 * times["select"] / times["prefill"])
        shares.sort()
        values = tuple(shares[round(q * (len(shares) - 1))] for q in (0.2, 0.5, 0.8))
        return [self.row(f"scores, {ATTENTION}", "of prefill", "%", values, len(shares), bound=2.0)]  # type: ignore[arg-type]

    def overhead(self, name: str, **where: Any) -> list[Row]:
        """A call with text only, attached and not."""
        with self.attach(self.other, **where):
            sides = {
                "plain": lambda: self.plain(**self.text, use_cache=True, logits_to_keep=1).logits,
                "vidtok": lambda: self.other(**self.text, use_cache=True, logits_to_keep=1).logits,
            }
            if not torch.equal(sides["plain"](), sides["vidtok"]()):
                raise AssertionError("expected the same logits of a call with text only, got others")
            times = turns(sides, self.size.calls, self.device)
        values = tuple(100 * (r - 1) for r in ratios(times["vidtok"], times["plain"]))
        return [
            self.row(
                f"text of {self.size.text} tokens, {name}", "more time", "%", values, len(times["plain"]), bound=1.0
            )  # type: ignore[arg-type]
        ]
