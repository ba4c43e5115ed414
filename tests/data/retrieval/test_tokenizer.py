"""Captions to ids: a tokenizer trained here, CLIP's files, OpenAI's list of merges."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidtok.data.retrieval import Words, load_tokenizer, train_tokenizer
from vidtok.data.retrieval import tokenizer as module

TEXTS = ["a red bar on the left", "a blue bar on the right", "the red bar's end is far away, isn't it?"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = train_tokenizer(TEXTS, tmp_path_factory.mktemp("words") / "made", 540)
    return folder, load_tokenizer(folder)


def test_training_is_the_same_every_time(trained: tuple[Path, Any], tmp_path: Path) -> None:
    again = train_tokenizer(TEXTS, tmp_path, 540)
    for name in ("vocab.json", "merges.txt"):
        assert (again / name).read_bytes() == (trained[0] / name).read_bytes()
    tokenizer = trained[1]
    first = [tuple(line.split()) for line in (again / "merges.txt").read_text().splitlines()[1:4]]
    # "ar" ends bar, bar, bar and far; no other pair comes four times.
    assert first[0] == ("a", "r</w>")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (540, 538, 539)
    assert len(tokenizer("a red bar", add_special_tokens=False)["input_ids"]) < len("aredbar")


@given(st.lists(st.text(max_size=30), max_size=4), st.integers(3, 12))
def test_rows_are_as_long_as_asked_and_end(trained: tuple[Path, Any], texts: list[str], length: int) -> None:
    ids, mask = Words(trained[1], length)(texts)
    assert ids.shape == mask.shape == (len(texts), length)
    for row, m in zip(ids.tolist(), mask.tolist()):
        n = sum(m)
        assert m == [1] * n + [0] * (length - n) and row[0] == 538 and row[n - 1] == 539 and not any(row[n:])
        # CLIP finds the end of a text by its highest id.
        assert row.index(max(row)) == n - 1


def test_words_come_back(trained: tuple[Path, Any]) -> None:
    ids, mask = Words(trained[1], 32)(["The RED bar's  left", "crème 猫"])
    texts = [trained[1].decode(row[: int(m.sum())].tolist()[1:-1]).strip() for row, m in zip(ids, mask)]
    assert texts[0].replace(" '", "'") == "the red bar's left" and texts[1].startswith("cr") and "猫" in texts[1]


def test_ids_are_the_same_with_every_transformers(trained: tuple[Path, Any]) -> None:
    # Lower case, accents kept, one token per digit and per byte that no merge knows.
    ids, _ = Words(trained[1], 14)(["Crème 42, ISN'T"])
    assert ids.tolist() == [[538, 66, 81, 127, 101, 76, 324, 275, 273, 267, 535, 333, 520, 539]]


def test_a_caption_that_spells_the_end_token(trained: tuple[Path, Any]) -> None:
    ids, mask = Words(trained[1], 16)(["red <|endoftext|> bar"])
    row = ids[0, : int(mask.sum())].tolist()
    assert row.count(539) == 1 and row[-1] == 539 and len(row) == 4


def test_openai_list(trained: tuple[Path, Any], tmp_path: Path) -> None:
    lines = (trained[0] / "merges.txt").read_text().splitlines()
    with gzip.open(tmp_path / module._OPENAI, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    (tmp_path / "ViT-B-32.pt").touch()
    for place in (tmp_path, tmp_path / "ViT-B-32.pt", tmp_path / module._OPENAI):
        other = load_tokenizer(place)
        assert other("a red bar")["input_ids"] == trained[1]("a red bar")["input_ids"]
    # The order that fixes the ids of OpenAI's checkpoints: "!" first, "a" and "a" at a word's end.
    vocabulary = other.get_vocab()
    assert [vocabulary[s] for s in ("!", "a", "!</w>", "a</w>", "Ā", "ÿ")] == [0, 64, 256, 320, 188, 187]
    (tmp_path / module._OPENAI).write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a gzip file of merges"):
        load_tokenizer(tmp_path)


def test_absent_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a CLIP tokenizer \(vocab.json and merges.txt.*got none"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="files of a CLIP tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="vocab_size of at least 514"):
        train_tokenizer(TEXTS, tmp_path, 100)
    with pytest.raises(ValueError, match="max_words of at least 3, got 2"):
        Words(None, 2)
