"""``vidtok run``: a video, a question, an answer, and what the reduction saved."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import vidtok
from vidtok.cli import load, measure, prompt
from vidtok.cli.errors import InputError, one_line, printable
from vidtok.cli.measure import Measured
from vidtok.data import Limits, Patches, Video, VideoReader, load_video, patchify

Notify = Callable[[str, "int | None", "int | None"], None]


@dataclass(frozen=True)
class Options:
    """What was asked on the command line, see ``vidtok run --help``; no repeat begins after ``budget`` seconds."""

    video: str
    question: str
    visual: str
    model: str = ""
    max_frames: int = 32
    fps: float | None = None
    max_pixels: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    position: str = "keep"
    max_new_tokens: int = 64
    compare: bool = False
    repeat: int = 1
    seed: int = 0
    report: str | None = None
    backend: str = "auto"
    isolate: bool = True
    decode_timeout: float = 120.0
    decoder: str = ""
    vision: str = ""
    budget: float = float("inf")


@dataclass(frozen=True)
class Outcome:
    """Everything that is printed and shown on the page."""

    options: Options
    name: str
    random: bool
    visual: str
    video: Video = field(repr=False)
    temporal_patch_size: int
    decode_seconds: float
    prompt_tokens: int
    visual_in: int
    visual_out: int
    reduced: Measured
    full: Measured | None
    answer: str
    full_answer: str | None
    device: str
    dtype: str

    @property
    def sample(self) -> Any:
        """What the attachment did to the video: grid, counts and executed plan."""
        return self.reduced.report.samples[0]

    @property
    def disturbed(self) -> str | None:
        """A sentence when the times of equal work differ so much that the machine must have been busy."""
        # With merging in the tower its work is not the same.
        if self.full is None or self.options.vision:
            return None
        low, high = sorted((self.full.times["vision"], self.reduced.times["vision"]))
        if high < 0.1 or high < 1.25 * low:
            return None
        return (
            f"The machine was busy: the vision tower did the same work on both sides, once in {low:.2f} s and once "
            f"in {high:.2f} s, so the times compare badly; a higher --repeat helps."
        )

    @property
    def rows(self) -> list[tuple[str, str, float | None, float]]:
        """(label, unit, unreduced, reduced) of every number, unreduced None without ``--compare``."""
        full, reduced = self.full, self.reduced
        saved = self.visual_in - self.visual_out
        table: list[tuple[str, str, float | None, float]] = [
            ("Patches in the tower's last MLP", "tokens", float(tower.tokens), float(tower.blocks[-1].merged))
            for tower in reduced.report.vision
        ]
        table += [("Visual tokens", "tokens", float(self.visual_in), float(self.visual_out))]
        table += [
            (f"  from layer {layer} on", "tokens", float(self.visual_in), float(plan.num_out))
            for layer, plan in self.sample.stages
        ]
        report = self.reduced.report
        table += [
            ("Prompt tokens", "tokens", float(self.prompt_tokens), float(self.prompt_tokens - saved)),
            ("KV cache", "B", float(report.kv_bytes + report.kv_bytes_saved), float(report.kv_bytes)),
            ("Video decode", "s", self.decode_seconds, self.decode_seconds),
        ]
        table += [
            ("Operations in the tower", "FLOPs", float(tower.flops_whole), float(tower.flops))
            for tower in report.vision
        ]
        names = {"vision": "Vision tower", "decide": "Decide", "move": "Move", "prefill": "Prefill"}
        for key, label in {**names, "decoding": "Decoding"}.items():
            before = full.times[key] if full and key not in ("decide", "move") else None
            table.append((label, "s", before, reduced.times[key]))
        table += [
            ("Time to first token", "s", full.first_token if full else None, reduced.first_token),
            ("Per decoded token", "s", full.per_token if full else None, reduced.per_token),
            ("Answer in all", "s", full.total if full else None, reduced.total),
            ("Peak memory", "B", float(full.peak_bytes) if full else None, float(reduced.peak_bytes)),
            ("Peak above idle", "B", float(full.extra_bytes) if full else None, float(reduced.extra_bytes)),
        ]
        return [(a, b, c if full or b in ("tokens", "FLOPs") else None, d) for a, b, c, d in table]


def check(options: Options) -> Any:
    """Refuse what can be refused before anything is loaded; returns the resolved method.

    Raises:
        ValueError: one sentence.
    """
    for name, value, least in (
        ("--max-frames", options.max_frames, 1),
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--repeat", options.repeat, 1),
        ("--max-pixels", options.max_pixels, 28 * 28),
    ):
        if value is not None and value < least:
            raise InputError(f"expected {name} of at least {least}, got {value}")
    for flag, number in (("--fps", options.fps), ("--decode-timeout", options.decode_timeout)):
        if number is not None and not 0 < number < float("inf"):
            raise InputError(f"expected {flag} as a positive number, got {number}")
    if not options.question.strip():
        raise InputError("expected a --question, got an empty one")
    if options.attention not in load.ATTENTION:
        raise InputError(f"expected --attn among {', '.join(load.ATTENTION)}, got {options.attention!r}")
    if options.position not in ("keep", "renumber"):
        raise InputError(f"expected --position keep or renumber, got {options.position!r}")
    if options.report is not None:
        target = Path(options.report)
        if target.is_dir() or not os.access(target.resolve().parent, os.W_OK):
            raise InputError(f"expected --report as a file in a writable folder, got {one_line(options.report)!r}")
        if target.exists() and Path(options.video).exists() and target.samefile(options.video):
            raise InputError("expected --report to be another file than --video, got the same")
    load.dtype_of(options.dtype, load.device_of(options.device))
    if options.model:
        load.check_name(options.model)
    from vidtok import spec
    from vidtok.models.drop import resolve_drop

    method = spec.resolve(options.visual)
    if options.decoder:
        resolve_drop(options.decoder)
    if options.vision:
        from vidtok.merge.spec import parse

        parse(options.vision)
    with VideoReader(options.video, **_reader(options)):
        return method


def _reader(options: Options) -> dict[str, Any]:
    limits = Limits(seconds=options.decode_timeout)
    return {"backend": options.backend, "isolate": options.isolate, "limits": limits}


def execute(options: Options, notify: Notify, make: Callable[[], load.Loaded] | None = None) -> Outcome:
    """Do it all; ``make`` builds a model where none is named.

    Raises:
        ValueError: one sentence for bad input.
    """
    method = check(options)
    device = load.device_of(options.device)
    dtype = load.dtype_of(options.dtype, device)
    torch.manual_seed(options.seed)
    notify("Loading the model" if make is None else "Building the model", None, None)
    if make is None:
        loaded = load.load(options.model, dtype=dtype, device=device, attention=options.attention)
    else:
        loaded = make()
    if options.max_pixels is not None:
        low = min(loaded.spec.min_pixels, options.max_pixels)
        loaded = replace(loaded, spec=replace(loaded.spec, max_pixels=options.max_pixels, min_pixels=low))
    begin = time.perf_counter()
    video = load_video(
        options.video,
        rule="linspace" if options.fps is None else "fps",
        count=options.max_frames,
        rate=options.fps,
        size=loaded.spec.size,
        progress=lambda done, total: notify("Decoding the video", done, total),
        **_reader(options),
    )
    patches = patchify(video.frames, loaded.spec, resize=False)
    decode_seconds = time.perf_counter() - begin
    return _answer(options, loaded, method, video, patches, decode_seconds, device, dtype, notify)


def _answer(
    options: Options,
    loaded: load.Loaded,
    method: Any,
    video: Video,
    patches: Patches,
    decode_seconds: float,
    device: torch.device,
    dtype: torch.dtype,
    notify: Notify,
) -> Outcome:
    model, tokenizer = loaded.model, loaded.tokenizer
    plain = prompt.build(model, tokenizer, video, patches, loaded.spec, options.question)
    inputs = prompt.to_device(plain, device, dtype)
    t, h, w = patches.grid_thw
    visual_in = t * (h // loaded.spec.merge_size) * (w // loaded.spec.merge_size)

    def one(attached: bool, tokens: int) -> Measured:
        with _attachment(model, method, options) if attached else contextlib.nullcontext() as handle:
            return measure.answer(model, inputs, max_new_tokens=tokens, handle=handle)

    reduced: list[Measured] = []
    full: list[Measured] = []
    begin = time.perf_counter()
    if options.compare:
        for attached in (False, True):
            notify(f"Warming up, {'reduced' if attached else 'unreduced'}", None, None)
            one(attached, 2)
    for turn in range(options.repeat):
        if turn and time.perf_counter() - begin > options.budget:
            break
        # Either comes first in turn, so that drift of the machine falls on both.
        for attached in (False, True) if turn % 2 == 0 else (True, False):
            if attached or options.compare:
                of = f", {turn + 1} of {options.repeat}" if options.repeat > 1 else ""
                notify(f"Answering, {'reduced' if attached else 'unreduced'}{of}", None, None)
                (reduced if attached else full).append(one(attached, options.max_new_tokens))
    options = replace(options, repeat=len(reduced))
    best = _typical(reduced)
    report = best.report
    if not report.samples:
        raise InputError("expected a video for the method to reduce, got none in the prompt")
    base = _typical(full) if full else None

    def text(run: Measured) -> str:
        return printable(tokenizer.decode(run.new_tokens, skip_special_tokens=not loaded.random)).strip()

    return Outcome(
        options=options,
        name=loaded.name,
        random=loaded.random,
        visual=str(method),
        video=video,
        temporal_patch_size=loaded.spec.temporal_patch_size,
        decode_seconds=decode_seconds,
        prompt_tokens=int(plain["input_ids"].shape[1]),
        visual_in=visual_in,
        visual_out=sum(s.tokens_out for s in report.samples),
        reduced=best,
        full=base,
        answer=text(best),
        full_answer=text(base) if base else None,
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
    )


@contextlib.contextmanager
def _attachment(model: Any, method: Any, options: Options) -> Iterator[Any]:
    handle = vidtok.attach(
        model,
        vision=options.vision or None,
        visual=method,
        decoder=options.decoder or None,
        position=options.position,
    )
    try:
        yield handle
    finally:
        handle.restore()


def _typical(runs: list[Measured]) -> Measured:
    """The last run with the median of each stage, so that one disturbed stage does not decide."""
    times = {stage: statistics.median(r.times[stage] for r in runs) for stage in measure.STAGES}
    total = sum(times.values())
    peak, extra = max(r.peak_bytes for r in runs), max(r.extra_bytes for r in runs)
    first = total - times["decoding"]
    return replace(runs[-1], times=times, first_token=first, total=total, peak_bytes=peak, extra_bytes=extra)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or 'CPU'}, {torch.get_num_threads()} threads"
