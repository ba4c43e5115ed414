"""The methods once more, in fp64 loops straight from their formulas.

Each function takes one video as nested lists or an fp64 array [t, l, C] and returns its outputs as
(anchor, {member: weight}) in ascending order of anchor.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

Output = tuple[int, dict[int, float]]


def kept(indices) -> list[Output]:
    return [(int(i), {int(i): 1.0}) for i in sorted(indices)]


def cosine(a, b) -> float:
    na, nb = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
    if na == 0 or nb == 0:
        return 0.0
    return min(1.0, max(-1.0, float(a @ b) / (na * nb)))


def uniform(n: int, k: int) -> list[Output]:
    return kept([0] if k == 1 else [i * (n - 1) // (k - 1) for i in range(k)])


def evs(x, ratio: float) -> list[Output]:
    t, n, _ = x.shape
    count = min(t * n, max(n, int(t * n * ratio)))
    score = [math.inf] * n + [1 - cosine(x[f, s], x[f - 1, s]) for f in range(1, t) for s in range(n)]
    return kept(sorted(range(t * n), key=lambda i: (-score[i], i))[:count])


def dtd(x, threshold: float, relative: bool) -> list[Output]:
    t, n, _ = x.shape
    out = list(range(n)) if t else []
    for f in range(1, t):
        score = [cosine(x[f, s], x[f - 1, s]) for s in range(n)]
        if relative:
            dropped = sorted(range(n), key=lambda s: (-score[s], s))[: int(n * threshold)]
        else:
            dropped = [s for s in range(n) if score[s] > threshold]
        out += [f * n + s for s in range(n) if s not in dropped]
    return kept(out)


def pool(t: int, h: int, w: int, oh: int, ow: int) -> list[Output]:
    out = []
    for f in range(t):
        for i in range(oh):
            for j in range(ow):
                top, bottom = math.floor(i * h / oh), math.ceil((i + 1) * h / oh)
                left, right = math.floor(j * w / ow), math.ceil((j + 1) * w / ow)
                area = (bottom - top) * (right - left)
                members = {f * h * w + r * w + c: 1 / area for r in range(top, bottom) for c in range(left, right)}
                out.append((f * h * w + (top + bottom - 1) // 2 * w + (left + right - 1) // 2, members))
    return out


def tome(x, target: int) -> list[Output]:
    t, n, c = x.shape
    out: list[Output] = []
    for f in range(t):
        tokens = [(f * n + s, [f * n + s]) for s in range(n)]
        flat = x.reshape(t * n, c)
        while len(tokens) > target:
            r = min(len(tokens) - target, len(tokens) // 2)
            value = [flat[m].mean(0) for _, m in tokens]
            metric = [v.reshape(16, -1).mean(0) if c % 16 == 0 else v for v in value]
            best = []
            for i in range(0, len(tokens), 2):
                scores = [cosine(metric[i], metric[j]) for j in range(1, len(tokens), 2)]
                j = max(range(len(scores)), key=lambda j: (scores[j], -j))
                best.append((-scores[j], i, 2 * j + 1))
            gone = sorted(best)[:r]
            for _, i, j in gone:
                tokens[j] = (tokens[j][0], tokens[j][1] + tokens[i][1])
            sources = {i for _, i, _ in gone}
            even = [tokens[i] for i in range(0, len(tokens), 2) if i not in sources]
            tokens = even + [tokens[j] for j in range(1, len(tokens), 2)]
        out += [(a, dict.fromkeys(m, 1 / len(m))) for a, m in tokens]
    return sorted(out, key=lambda o: o[0])


def dpc_knn(z, num_clusters: int, k: int) -> tuple[list[int], list[int]]:
    """Rank of the centre of each vector, and the centres by rank."""
    n, c = z.shape
    d = np.array([[math.sqrt(float((z[i] - z[j]) @ (z[i] - z[j])) / c) for j in range(n)] for i in range(n)])
    density = [math.exp(-float(np.mean(np.sort(d[i] ** 2)[: min(k, n)]))) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-density[i], i))
    delta = [0.0] * n
    for place, i in enumerate(order):
        delta[i] = min((d[i, j] for j in order[:place]), default=float(d.max()))
    center = sorted(range(n), key=lambda i: (-density[i] * delta[i], i))[:num_clusters]
    assignment = []
    for i in range(n):
        nearest = min(range(num_clusters), key=lambda rank: (d[i, center[rank]], center[rank]))
        assignment.append(center.index(i) if i in center else nearest)
    return assignment, center


def segments(labels: list[int]) -> list[int]:
    """Frames per temporal segment, one frame at a time."""
    runs, start = [], 0
    for f in range(1, len(labels) + 1):
        if f == len(labels) or labels[f] != labels[start]:
            runs.append((start, f))
            start = f
    current: list[int | None] = [None] * len(labels)
    for a, b in runs:
        longest = max(e - s for s, e in runs if labels[s] == labels[a])
        if b - a == longest and longest > 1:
            current[a:b] = labels[a:b]

    def run_length(f: int, step: int) -> int:
        n = 0
        g = f
        while 0 <= g < len(current) and current[g] is not None and current[g] == current[f]:
            n, g = n + 1, g + step
        return n

    f = 0
    while f < len(current):
        if current[f] is not None:
            f += 1
            continue
        stop = f
        while stop < len(current) and current[stop] is None:
            stop += 1
        left = run_length(f - 1, -1) if f else 0
        right = run_length(stop, 1) if stop < len(current) else 0
        label = 0 if not left and not right else current[stop] if right > left else current[f - 1]
        current[f:stop] = [label] * (stop - f)
        f = stop
    out = [1]
    for a, b in itertools.pairwise(current):
        if a == b:
            out[-1] += 1
        else:
            out.append(1)
    return out


def merged(vectors, sources: list[Output], ratio: float, k: int) -> list[Output]:
    """A group of vectors, each already a combination of tokens, as plain means of clusters."""
    n = len(sources)
    if n <= 14:
        return sources
    count = max(1, int(n * ratio))
    assignment, center = dpc_knn(np.stack(vectors), count, k)
    out = []
    for rank in range(count):
        group = [i for i in range(n) if assignment[i] == rank]
        weights: dict[int, float] = {}
        for i in group:
            for token, w in sources[i][1].items():
                weights[token] = weights.get(token, 0.0) + w / len(group)
        out.append((sources[center[rank]][0], weights))
    return out


def prunevid(x, tau=0.8, cluster_ratio=0.5, temporal_segment_ratio=0.25, k=7) -> tuple[list[Output], list[int]]:
    """The outputs, and the frames per segment."""
    t, n, _ = x.shape
    labels, _ = dpc_knn(x.mean(1), max(1, int(t * temporal_segment_ratio)), k)
    windows = segments(labels)
    out: list[Output] = []
    start = 0
    for w in windows:
        frames = range(start, start + w)
        start += w
        static = []
        for s in range(n):
            pairs = [cosine(x[a, s], x[b, s]) for a in frames for b in frames if a != b]
            if pairs and sum(pairs) / len(pairs) > tau:
                static.append(s)
        vectors = [np.mean([x[f, s] for f in frames], axis=0) for s in static]
        sources = [(frames[0] * n + s, {f * n + s: 1 / w for f in frames}) for s in static]
        out += merged(vectors, sources, cluster_ratio, k)
        for f in frames:
            dynamic = [s for s in range(n) if s not in static]
            tokens = [(f * n + s, {f * n + s: 1.0}) for s in dynamic]
            out += merged([x[f, s] for s in dynamic], tokens, cluster_ratio, k)
    return sorted(out, key=lambda o: o[0]), windows
