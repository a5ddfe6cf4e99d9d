"""The random bits of dropout: Philox4x32-10 against its published vectors and against a second implementation."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import functional
from fastattn.philox import keep_mask, philox_4x32

# Random123 1.14, tests/kat_vectors: philox4x32 10 <counter> <key> <result>
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def _philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, from the paper."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        low = 0xFFFFFFFF
        c = ((p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low)
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    c, k = (tuple(torch.tensor(word) for word in _words(text)) for text in (counter, key))
    assert tuple(int(word) for word in philox_4x32(c, k)) == _words(result)
    assert _philox(_words(counter), _words(key)) == _words(result)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("seed", [(0, 0), (-1, -1), (2**63 - 1, -(2**63)), (1234567890123, 77)])
def test_keep_mask_is_the_documented_function_of_place(seed: tuple[int, int], dropout_p: float) -> None:
    """counter (j >> 2, i, b * H + h, low word of the offset), key the two words of the seed, word j & 3."""
    heads, rows, cols = torch.tensor([0, 3, 70000]), torch.tensor([0, 1, 65537]), range(3, 22)
    kept = keep_mask(torch.tensor(seed), dropout_p, heads, rows, cols)
    assert kept.shape == (3, 3, 19)
    low = 0xFFFFFFFF
    for n, head in enumerate(heads.tolist()):
        for r, row in enumerate(rows.tolist()):
            for c, col in enumerate(cols):
                words = _philox((col >> 2, row, head, seed[1] & low), (seed[0] & low, (seed[0] >> 32) & low))
                assert bool(kept[n, r, c]) == (words[col & 3] >= int(dropout_p * 2**32))


def test_a_word_at_the_threshold_is_kept(backend: str) -> None:
    """keep iff word >= floor(p * 2^32), to the last bit, in every backend."""
    q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    torch.manual_seed(0)
    seed = functional.lower(q, q, q, dropout_p=0.5).dropout_seed
    key = (int(seed[0]) & 0xFFFFFFFF, (int(seed[0]) >> 32) & 0xFFFFFFFF)
    word = _philox((0, 0, 0, int(seed[1]) & 0xFFFFFFFF), key)[0]
    for threshold, kept in ((word - 1, True), (word, True), (word + 1, False)):
        torch.manual_seed(0)
        out = fastattn.attention(q, q, q + 1, dropout_p=threshold / 2**32, backend=backend)
        assert (out != 0).all() == kept
        assert bool(keep_mask(seed, threshold / 2**32, torch.tensor([0]), torch.tensor([0]), range(1))) == kept
