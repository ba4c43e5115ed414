"""``vidtok tune``: measures the candidates of every GPU kernel on the present GPU and writes the user's table."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vidtok.cli.errors import InputError, one_line
from vidtok.kernels import tables
from vidtok.kernels.tables import _files
from vidtok.kernels.tables.tuning import Call, Measured, Notify, Task, Timer, measure, merged


def gpu_timer(replays: int = 11) -> Timer:
    """Median time of a call on the current GPU: replays of a CUDA graph between events, or plain calls where the
    operator cannot be captured. Inputs that fit the L2 cache stay in it."""
    import torch

    def between(run: Call, times: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])]

    def waits(call: Call) -> bool:
        """Whether the call waits for the GPU; then it cannot be captured, and trying would harm torch's allocator."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return False

    def timer(call: Call) -> float:
        call()
        if waits(call):
            return statistics.median(between(call, replays))
        once = min(between(call, 3))
        calls = max(1, min(16, int(2e-4 / max(once, 1e-6))))
        present = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(present)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                call()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                for _ in range(calls):
                    call()
        except RuntimeError:
            torch.cuda.set_stream(present)  # torch leaves the stream of a failed capture current
            torch.cuda.synchronize()
            return statistics.median(between(call, replays))
        graph.replay()
        return statistics.median(between(graph.replay, replays)) / calls

    return timer


def run(minutes: float, out: str | None, operators: Sequence[str], keep_bits: bool) -> None:
    """Tune the present GPU, with progress on standard error and a summary on standard output.

    Raises:
        InputError: no GPU, or none that a GPU backend serves.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("expected a GPU that torch can use, got none")
    for name in operators:
        if name not in tables.OPERATORS:
            raise InputError(f"expected operators among {', '.join(tables.OPERATORS)}, got {name}")
    path = Path(out) if out else _files.user_path()
    if path is None:
        raise InputError("expected a file to write, got VIDTOK_TUNING=off and no --out")
    from vidtok.cli import calls
    from vidtok.kernels import select

    device = torch.cuda.current_device()
    sm, name = select.sm_of(device), torch.cuda.get_device_name(device)
    tasks, why = _tasks(operators or tables.OPERATORS, sm, device)
    if not tasks:
        raise InputError(f"expected a GPU backend that serves this GPU, got none: {one_line('; '.join(why))}")
    found = _present(path)

    def make(op: str, shape: Mapping[str, int], dtype: str) -> Call:
        return calls.build(op, shape, getattr(torch, dtype), f"cuda:{device}")

    about = {
        "gpu": name,
        "sms": torch.cuda.get_device_properties(device).multi_processor_count,
        "versions": _versions(),
    }

    def save(measured: Measured) -> None:
        _files.write(path, merged(found, sm, about, measured))

    with torch.no_grad(), _Bars() as notify:
        measured = measure(
            tasks, sm, f"measured on {name}", gpu_timer(), make, 60 * minutes,
            keep_bits=keep_bits, using=select.use_backend, notify=notify, save=save,
        )  # fmt: skip
    tables.reload()
    _print(measured, path, name)


def _present(path: Path) -> dict[str, Any]:
    """The file as it is; one that cannot be read is replaced, and that is said."""
    try:
        found = _files.read_user(path)
        for sm, own in found["gpus"].items():
            _files.parse(own, int(sm))
        return found
    except ValueError as error:
        print(f"vidtok: {path} is replaced: {one_line(error)}", file=sys.stderr)
        return {"format": _files.FORMAT, "gpus": {}}


def _tasks(operators: Iterable[str], sm: int, device: int) -> tuple[list[Task], list[str]]:
    """Kernels that can be measured here, and why others cannot."""
    from vidtok.kernels import select

    tasks: list[Task] = []
    why: dict[str, None] = {}
    half = ("bfloat16", "float16") if sm >= 80 else ("float16",)
    for backend in tables.BACKENDS:
        for op in operators:
            name = "bipartite_merge" if op == "bipartite" else op
            try:
                (select.can_run_cuda if backend == "cuda" else select.can_run_triton)(name, device, raise_error=True)
            except RuntimeError as error:
                why[str(error)] = None
                continue
            listed = tables.dtypes(op, sm)
            tasks += [Task(backend, op, half)] if len(listed) > 1 else []
            tasks.append(Task(backend, op, ("float32",)))
    # 16-bit floats matter most, and cuda serves where both do.
    return sorted(tasks, key=lambda t: (t.backend == "triton", t.dtypes[0] == "float32" and t.op in _HALVES)), list(why)


_HALVES = tuple(op for op in tables.OPERATORS if len(tables.dtypes(op, 80)) > 1)


def _versions() -> dict[str, str]:
    import torch

    import vidtok

    out = {"vidtok": vidtok.__version__, "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    try:
        import triton

        out["triton"] = str(triton.__version__)
    except ImportError:
        pass
    return out


class _Bars(AbstractContextManager[Notify]):
    """A progress bar on standard error; plain lines where that is no terminal."""

    def __enter__(self) -> Notify:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.bars.start()
        row = self.bars.add_task("", total=None)

        def notify(text: str, done: int, total: int) -> None:
            self.bars.update(row, description=text, completed=done, total=total)
            if text and not sys.stderr.isatty():
                print(f"{done + 1} of {total}: {text}", file=sys.stderr, flush=True)

        return notify

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


def _print(measured: Measured, path: Path, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("operator", "backend", "candidates", "rank correlation", "best / modelled choice", box=None)
    ranks = measured.correlation()
    for (backend, op), gains in measured.gains.items():
        found = ranks.get(backend, {}).get(op)
        cells = (str(found["candidates"]), f"{found['spearman']:.2f}") if found else ("", "")
        table.add_row(op, backend, *cells, f"{statistics.geometric_mean(gains):.2f} x faster")
    out = Console(highlight=False)
    out.print(f"Measured on {name}; the table is {path}.")
    out.print(table)
    for text in measured.failed[:8]:
        out.print(f"did not run: {text}")
    if len(measured.failed) > 8:
        out.print(f"and {len(measured.failed) - 8} more did not run")
    if measured.left:
        names = ", ".join(f"{t.op} ({t.backend}, {t.dtypes[0]})" for t in measured.left)
        out.print(f"No time was left for {names}; --minutes gives more.")
    if measured.table.frozen:
        out.print(
            "Some knobs of this table change the last bits of results: machines agree when they share the table "
            "(docs/tuning.md), or tune with --keep-bits."
        )
