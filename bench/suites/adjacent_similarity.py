"""adjacent_similarity against unit rows and products."""

from __future__ import annotations

from torch import Tensor

from bench.baselines import adjacent_similarity as baseline
from bench.case import Case, Inputs, Provider, Target, compiled, tokens
from vidtok import ops

SHAPES = ((16, 24, 1024), (32, 14, 3584))
# Cosines are rounded to multiples of 2⁻²⁰.
ROUNDING = 2.0**-18
TARGETS = (Target("limit", 1.3), Target("eager", 3), Target("compile", 1.3))


def _maps(i: Inputs, frames: int) -> Tensor:
    return i["x"].view(frames, -1, i["x"].shape[1])


def _previous(frames: int, side: int, c: int) -> Case:
    grid, n = [(frames, side, side)], frames * side * side
    compiled_score = compiled(baseline.previous_eager)
    return Case(
        "adjacent_similarity",
        f"previous, {frames}×{side * side}×{c}",
        lambda seed: {"x": tokens(seed, n, c)},
        Provider("vidtok", "adjacent_similarity", lambda i: ops.adjacent_similarity(i["x"], grid)),
        (
            Provider("eager", "normalize, product, sum", lambda i: baseline.previous_eager(_maps(i, frames))),
            Provider(
                "careful", "norms, products frame by frame", lambda i: baseline.previous_careful(_maps(i, frames))
            ),
        ),
        ((4.0 * n * c + 4 * n, 0.0),),
        TARGETS,
        Provider("compile", "torch.compile of eager", lambda i: compiled_score(_maps(i, frames))),
        atol=ROUNDING,
    )


def _window(frames: int, width: int, side: int, c: int) -> Case:
    grid, n = [(frames, side, side)], frames * side * side
    windows = [width] * (frames // width)
    compiled_score = compiled(baseline.window_eager)
    return Case(
        "adjacent_similarity",
        f"windows of {width}, {frames}×{side * side}×{c}",
        lambda seed: {"x": tokens(seed, n, c)},
        Provider(
            "vidtok",
            "adjacent_similarity",
            lambda i: ops.adjacent_similarity(i["x"], grid, to="window", window=windows),
        ),
        (
            Provider("eager", "normalize, all pairs", lambda i: baseline.window_eager(_maps(i, frames), width)),
            Provider(
                "careful", "norm of the sum, frame by frame", lambda i: baseline.window_careful(_maps(i, frames), width)
            ),
        ),
        ((4.0 * n * c + 4 * n / width, 0.0),),
        TARGETS,
        Provider("compile", "torch.compile of eager", lambda i: compiled_score(_maps(i, frames), width)),
        atol=ROUNDING,
    )


def cases(tiny: bool = False) -> list[Case]:
    """The same slot one frame earlier, and the mean over a segment's pairs."""
    if tiny:
        return [_previous(3, 3, 16), _window(4, 2, 3, 16)]
    return [*(_previous(*shape) for shape in SHAPES), _window(32, 4, 14, 3584)]
