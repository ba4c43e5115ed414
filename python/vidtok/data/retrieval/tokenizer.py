"""Captions to CLIP's token ids: the tokenizer of a checkpoint, or a small one trained here."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidtok._check import fail
from vidtok.data._decode import shown

START, END = "<|startoftext|>", "<|endoftext|>"
_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_OPENAI = "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class Words:
    """Rows of token ids: start, at most ``max_words - 2`` tokens, end, then zeros.

    Args:
        tokenizer: a CLIPTokenizer of transformers.
        max_words: length of a row.

    Example:
        >>> import tempfile
        >>> words = Words(load_tokenizer(train_tokenizer(["a dog runs"], tempfile.mkdtemp())), 6)
        >>> ids, mask = words(["a dog"])
        >>> ids.shape, mask.tolist()
        (torch.Size([1, 6]), [[1, 1, 1, 1, 0, 0]])
    """

    tokenizer: Any
    max_words: int = 32

    def __post_init__(self) -> None:
        if self.max_words < 3:
            fail("max_words of at least 3", f"{self.max_words}")

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids and mask, both ``[n, max_words]``."""
        ids = torch.zeros(len(captions), self.max_words, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # An empty list is no batch for the tokenizer.
        bodies = self.tokenizer(list(captions), add_special_tokens=False)["input_ids"] if captions else []
        for row, body in enumerate(bodies):
            # A caption that spells the end token would end the text early.
            inner = [t for t in body if t not in (start, end)][: self.max_words - 2]
            line = [start, *inner, end]
            ids[row, : len(line)] = torch.tensor(line)
            mask[row, : len(line)] = 1
        return ids, mask


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The CLIPTokenizer of a folder: transformers' files, or OpenAI's ``bpe_simple_vocab_16e6.txt.gz``.

    A file is taken for the one beside it. Nothing is downloaded.

    Raises:
        ValueError: when there is none, or it does not load.
    """
    # The fast one: the other takes accents off where ftfy is not installed, and is slow.
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    place = Path(folder)
    if place.is_file() and place.name != _OPENAI:
        place = place.parent
    openai = place if place.is_file() else place / _OPENAI
    if ((place / "vocab.json").is_file() and (place / "merges.txt").is_file()) or (place / "tokenizer.json").is_file():
        try:
            return CLIPTokenizerFast.from_pretrained(str(place), local_files_only=True)
        except Exception as error:  # what a damaged file raises differs from version to version
            said = " ".join(str(error).split())[:120]
            fail("files of a CLIP tokenizer", f"{shown(str(place))}, which do not load ({said})")
    if openai.is_file():
        with tempfile.TemporaryDirectory() as made:
            _write(_openai_vocabulary(openai), Path(made))
            return CLIPTokenizerFast.from_pretrained(made, local_files_only=True)
    text = f"vocab.json and merges.txt, tokenizer.json, or {_OPENAI}"
    fail(f"a CLIP tokenizer ({text}) in {shown(str(place))}", "none")


def train_tokenizer(captions: Iterable[str], folder: str | os.PathLike[str], vocab_size: int = 1024) -> Path:
    """Train a small BPE of CLIP's kind on captions and write it as :func:`load_tokenizer` reads it.

    Ids: 256 bytes, the same at a word's end, merges, start, end; the end token has the highest id, by which CLIP finds
    the end of a text. The same captions give the same files.

    Raises:
        ValueError: for a size that leaves no room for merges.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    if vocab_size < 514:
        fail("vocab_size of at least 514 (512 bytes, start and end)", f"{vocab_size}")
    normal = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = Counter(w for text in captions for w, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _write(_merges(words, vocab_size - 514), place)
    return place


def _merges(words: Mapping[str, int], count: int) -> list[tuple[str, ...]]:
    """The ``count`` most frequent pairs, one after another; of equally frequent ones the first in the alphabet.

    The trainer of the package tokenizers breaks ties by the order of a hash table, which differs from call to call.
    """
    split = {(*w[:-1], w[-1] + "</w>"): n for w, n in sorted(words.items())}
    merges: list[tuple[str, ...]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, ...]] = Counter()
        for symbols, n in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        split = {_joined(symbols, best): n for symbols, n in split.items()}
    return merges


def _joined(symbols: tuple[str, ...], pair: tuple[str, ...]) -> tuple[str, ...]:
    if pair[0] not in symbols:
        return symbols
    out: list[str] = []
    i = 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            out.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def _alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: printable ones first."""
    shown_as = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown_as] + [chr(256 + n) for n in range(256 - len(shown_as))]


def _openai_vocabulary(path: Path) -> list[tuple[str, ...]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read(1 << 26).split("\n")
    except (OSError, EOFError, UnicodeDecodeError):
        fail("a gzip file of merges", f"{shown(str(path))}, which is none")
    # Of the published list CLIP uses as many merges as leave 49408 ids in all.
    merges = [tuple(line.split()) for line in lines[1 : 49408 - 512 - 2 + 1]]
    if any(len(m) != 2 for m in merges):
        fail("two symbols in every line of merges", f"{shown(str(path))} with other lines")
    return merges


def _write(merges: Sequence[tuple[str, ...]], folder: Path) -> None:
    letters = _alphabet()
    symbols = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
