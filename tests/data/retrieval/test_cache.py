"""The cache of decoded frames: keys, bounds, damage, and several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from vidtok.data.retrieval import FrameCache
from vidtok.data.retrieval import cache as module


def frame(value: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (3, size, size), dtype=np.uint8)


def test_frames_come_back(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "new")
    assert cache.get("k", [1], 4) == (None, {}) and cache.facts("k") is None
    cache.add("k", {"candidates": [0, 9]}, {3: frame(3), 7: frame(7)})
    cache.add("k", {"candidates": [0, 9]}, {5: frame(5), 3: frame(3)})
    facts, found = FrameCache(tmp_path / "new").get("k", [3, 5, 6, 7], 4)
    assert facts == {"candidates": [0, 9]} and sorted(found) == [3, 5, 7]
    assert all(np.array_equal(found[n], frame(n)) for n in found)
    assert cache.get("other", [3], 4) == (None, {})


def test_keys_follow_the_file_and_the_rules(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"one")
    keys = {FrameCache.key(path, None, 224), FrameCache.key(path, None, 112), FrameCache.key(path, (0.0, 1.0), 224)}
    assert len(keys) == 3 and FrameCache.key(path, None, 224) in keys
    os.utime(path, ns=(1, 1))
    assert FrameCache.key(path, None, 224) not in keys
    (tmp_path / "link.mp4").symlink_to(path)
    assert FrameCache.key(tmp_path / "link.mp4", 1) == FrameCache.key(path, 1)


def test_the_limit_holds_and_the_least_used_leave(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, limit=60_000)
    for i in range(12):
        cache.add(f"k{i}", {}, {0: frame(i, 48)})
        os.utime(cache._path(f"k{i}"), (i, i))
        cache.get("k0", [0], 48)  # used again and again
    assert cache.size() <= 60_000
    assert cache.get("k0", [0], 48)[1] and not cache.get("k1", [0], 48)[1] and cache.get("k11", [0], 48)[1]


@pytest.mark.parametrize("damage", ["torn", "flipped", "head", "facts", "emptied"])
def test_damaged_files_are_no_frames(tmp_path: Path, damage: str) -> None:
    cache = FrameCache(tmp_path)
    cache.add("k", {"a": 1}, {1: frame(1), 2: frame(2)})
    path = cache._path("k")
    data = bytearray(path.read_bytes())
    if damage == "torn":
        data = data[:-5]
    elif damage == "flipped":
        data[-3] ^= 255
    elif damage == "head":
        data[0] ^= 255
    elif damage == "facts":
        data[16] = 0
    else:
        data = bytearray()
    path.write_bytes(data)
    _, found = cache.get("k", [1, 2], 4)
    assert all(np.array_equal(found[n], frame(n)) for n in found) and len(found) < 2
    cache.add("k", {"a": 1}, {2: frame(2), 1: frame(1)})
    facts, found = cache.get("k", [1, 2], 4)
    assert facts == {"a": 1} and len(found) == 2 and np.array_equal(found[2], frame(2))


def test_the_checksum_is_what_finds_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_check", lambda number, frame: 7)
    cache = FrameCache(tmp_path)
    cache.add("k", {}, {1: frame(1)})
    data = bytearray(cache._path("k").read_bytes())
    data[-3] ^= 255
    cache._path("k").write_bytes(data)
    assert not np.array_equal(cache.get("k", [1], 4)[1][1], frame(1))


def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = FrameCache(tmp_path)
    monkeypatch.setattr(module.tempfile, "mkstemp", full)
    cache.add("k", {}, {1: frame(1)})
    assert cache.get("k", [1], 4) == (None, {})
    with pytest.raises(ValueError, match="a cache limit of at least 1 byte, got 0"):
        FrameCache(tmp_path, 0)


def _work(folder: Path, seed: int) -> None:
    cache = FrameCache(folder, limit=100_000)
    rng = np.random.default_rng(seed)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        key, number = f"k{rng.integers(6)}", int(rng.integers(40))
        facts, found = cache.get(key, [number], 24)
        if number in found:
            assert facts == {"key": key} and np.array_equal(found[number], frame(number, 24))
        else:
            cache.add(key, {"key": key}, {number: frame(number, 24)})


def test_several_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, s)) for s in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    cache = FrameCache(tmp_path, limit=100_000)
    assert cache.size() <= 100_000 * (1 + 3 / 16) + 3 * 2000
    good = sum(len(cache.get(f"k{i}", range(40), 24)[1]) for i in range(6))
    assert good > 10
