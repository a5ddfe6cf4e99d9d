"""Rotary: its tables, the identities that define it, what it prints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Rotary


def tables(positions: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The standard tables, base 10000."""
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def test_matches_the_rotate_half_of_llama(backend: str, device: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="compares with transformers' Llama")
    q, k, v = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(3))
    cos, sin = tables(10, 4)
    q2, k2 = llama.apply_rotary_pos_emb(q, k, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None])
    want = torch.nn.functional.scaled_dot_product_attention(q2, k2, v, is_causal=True)
    got = fastattn.attention(q, k, v, rotary=Rotary(cos, sin), mask=fastattn.Causal(), backend=backend)
    torch.testing.assert_close(got, want)


def test_matches_the_interleaved_rotation_of_gptj(backend: str, device: str) -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj", reason="compares with transformers' GPT-J")
    q, k, v = (torch.randn(2, 3, 10, 8, dtype=torch.float64) for _ in range(3))
    cos, sin = tables(10, 4)
    q2, k2 = (gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin[None], cos[None]).transpose(1, 2) for x in (q, k))
    want = torch.nn.functional.scaled_dot_product_attention(q2, k2, v)
    got = fastattn.attention(q, k, v, rotary=Rotary(cos, sin, interleaved=True), backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool, backend: str, device: str) -> None:
    """Shifting all positions by the same amount changes nothing."""
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    cos, sin = tables(40, 4)
    at_zero = fastattn.attention(q, k, v, rotary=Rotary(cos, sin, interleaved), backend=backend)
    shifted = Rotary(cos[30:], sin[30:], interleaved)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=shifted, backend=backend), at_zero)


def test_decoding_with_a_cache_equals_the_full_pass(backend: str, device: str) -> None:
    """One query at a time against the keys so far gives the rows of the full causal pass."""
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    k, v = k[:, :2], v[:, :2]
    keywords = {"rotary": Rotary(*tables(9, 4)), "mask": fastattn.Causal(), "backend": backend}
    full = fastattn.attention(q, k, v, **keywords)
    for i in range(9):
        row = fastattn.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **keywords)
        torch.testing.assert_close(row, full[:, :, i : i + 1])


def test_offsets_per_sequence(backend: str, device: str) -> None:
    q = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 9, 8, dtype=torch.float64) for _ in range(2))
    offsets = torch.tensor([6, 2])
    keywords = {"rotary": Rotary(*tables(9, 4)), "mask": fastattn.Causal(), "backend": backend}
    got = fastattn.attention(q, k, v, query_offset=offsets, **keywords)
    for b in range(2):
        one = fastattn.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], query_offset=int(offsets[b]), **keywords)
        torch.testing.assert_close(got[b : b + 1], one)


def test_angle_zero_is_no_rotation(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    rotary = Rotary(torch.ones(6, 3), torch.zeros(6, 3))
    want = fastattn.attention(q, k, v, backend=backend)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=rotary, backend=backend), want)


def test_materialize() -> None:
    cos, sin = tables(12, 4)
    for offset, first in ((None, 2), (3, 3)):
        qc, qs, kc, ks = Rotary(cos, sin).materialize(5, 7, offset)
        assert torch.equal(qc[0], cos[first : first + 5])
        assert torch.equal(qs[0], sin[first : first + 5])
        assert torch.equal(kc[0], cos[:7])
        assert torch.equal(ks[0], sin[:7])
    qc, qs, kc, ks = Rotary(cos, sin, key_cos=2 * cos, key_sin=3 * sin).materialize(2, 7, torch.tensor([1, 5]))
    assert torch.equal(qc, torch.stack((cos[1:3], cos[5:7])))
    assert torch.equal(qs, torch.stack((sin[1:3], sin[5:7])))
    assert torch.equal(kc[0], 2 * cos[:7])
    assert torch.equal(ks[0], 3 * sin[:7])
    batched = torch.stack((cos, -cos)), torch.stack((sin, -sin))
    qc, *_ = Rotary(*batched).materialize(2, 7, 4)
    assert torch.equal(qc.expand(2, -1, -1), batched[0][:, 4:6])


@pytest.mark.parametrize(
    ("rotary", "text"),
    [
        (Rotary(*tables(16, 4)), "Rotary(positions=16, width=8)"),
        (Rotary(*tables(16, 2), interleaved=True), "Rotary(positions=16, width=4, interleaved=True)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_repr(rotary: Rotary, text: str) -> None:
    assert repr(rotary) == text


def test_pickle_and_deepcopy() -> None:
    rotary = Rotary(*tables(9, 4), interleaved=True)
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    want = fastattn.attention(q, k, v, rotary=rotary)
    for again in (pickle.loads(pickle.dumps(rotary)), copy.deepcopy(rotary)):
        assert torch.equal(fastattn.attention(q, k, v, rotary=again), want)


def test_half_precision_tables_and_operands(backend: str, device: str) -> None:
    """Tables are used in float32 whatever the operands' dtype; half precision tables are taken as they are."""
    q, k, v = (torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3))
    cos, sin = tables(9, 4, torch.float32)
    got = fastattn.attention(q, k, v, rotary=Rotary(cos, sin), backend=backend)
    want = fastattn.attention(q.double(), k.double(), v.double(), rotary=Rotary(cos, sin), backend="reference")
    torch.testing.assert_close(got.double(), want, atol=0.03, rtol=0)
    got = fastattn.attention(q, k, v, rotary=Rotary(cos.bfloat16(), sin.bfloat16()), backend=backend)
    torch.testing.assert_close(got.double(), want, atol=0.06, rtol=0)
