"""The task of ``demo --train``: give a text its vowels back.

The text is Python's own language reference, which every Python ships as `pydoc_data.topics`.  The source of a pair is
a run of words without its vowels, save a word's first letter; the target is the words::

    th vl of th exprssn   ->   the value of the expression
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOWELS = "aeiou"
LETTERS = " abcdefghijklmnopqrstuvwxyz"
PADDING, BEGIN, END = 0, 1, 2
SYMBOLS = 3 + len(LETTERS)
LONGEST = 32  # letters of a target
_HELD_OUT = 10  # every tenth topic


def without_vowels(text: str) -> str:
    """The words without their vowels, first letters aside."""
    return " ".join(word[:1] + word[1:].translate({ord(v): None for v in VOWELS}) for word in text.split())


def encode(text: str) -> list[int]:
    return [3 + LETTERS.index(letter) for letter in text]


def decode(ids: Sequence[int]) -> str:
    """The text up to its end."""
    letters = []
    for symbol in ids:
        if symbol == END:
            break
        letters.append(LETTERS[symbol - 3] if symbol > END else "")
    return "".join(letters)


@dataclass(frozen=True)
class Pairs:
    """Sources and targets as padded ids: source (N, S), target (N, T) with BEGIN and END around the text."""

    texts: list[str]
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> Pairs:
        sources = [encode(without_vowels(text)) for text in texts]
        targets = [[BEGIN, *encode(text), END] for text in texts]
        return cls(list(texts), _padded(sources), _padded(targets))

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Source and target of some pairs, without columns that are padding for all of them."""
        return _trimmed(self.source[index]), _trimmed(self.target[index])


def load() -> tuple[Pairs, Pairs]:
    """The pairs to learn from, and those of topics that are held out, no text of which is among the first."""
    from pydoc_data.topics import topics

    texts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        texts[number % _HELD_OUT == 0].extend(_lines(re.findall("[a-z]+", topics[name].lower())))
    learned = list(dict.fromkeys(texts[0]))
    known = set(learned)
    return Pairs.of(learned), Pairs.of([text for text in dict.fromkeys(texts[1]) if text not in known])


def _lines(words: Sequence[str]) -> list[str]:
    """Words in a row, as many as fit into a target."""
    lines, line = [], ""
    for word in words:
        longer = f"{line} {word}".strip()
        if len(longer) > LONGEST:
            lines.append(line)
            longer = word[:LONGEST]
        line = longer
    return [text for text in lines if len(text) > LONGEST // 2]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows), default=0)), PADDING)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.tensor(row)
    return out


def _trimmed(x: Tensor) -> Tensor:
    used = (x != PADDING).any(0).nonzero()
    return x[:, : int(used.max()) + 1] if len(used) else x
