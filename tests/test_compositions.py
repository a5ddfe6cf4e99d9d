"""Random compositions of features at random shapes, on every backend and dtype."""

from __future__ import annotations

import pytest
import torch
from features import BIASES, CONTENT, MASKS, ROTARY, SINKS, Shape
from hypothesis import given
from hypothesis import strategies as st
from oracle import Call, check

LENGTHS = st.sampled_from([1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 129])


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype) -> Call:
    kv_heads = draw(st.integers(1, 3))
    shape = Shape(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        query_length=draw(LENGTHS),
        key_length=draw(LENGTHS),
        head_dim=draw(st.sampled_from([2, 4, 6, 16, 24, 64, 72])),
        value_dim=draw(st.sampled_from([1, 3, 8, 16, 33, 64])),
    )
    some = [
        *draw(st.lists(st.sampled_from(MASKS), max_size=3, unique=True)),
        *draw(st.lists(st.sampled_from([*BIASES, *CONTENT]), max_size=3, unique=True)),
    ]
    if draw(st.booleans()):
        some.append("softcap")
    if draw(st.integers(0, 2)) == 0:
        some.append(draw(st.sampled_from(SINKS)))
    rotary = draw(st.integers(0, 2)) == 0
    if rotary:
        some.append(draw(st.sampled_from(ROTARY)))
    # Rotary tables have no row for a negative position.
    offsets = st.integers(0 if rotary else -70, 140)
    offset = draw(st.one_of(st.none(), offsets, st.lists(offsets, min_size=shape.batch, max_size=shape.batch)))
    if isinstance(offset, list):
        offset = torch.tensor(offset)
    if offset is None and rotary and shape.query_length > shape.key_length:
        offset = 0
    return Call(
        tuple(some), shape, dtype,
        seed=draw(st.integers(0, 2**31)),
        offset=offset,
        scale=draw(st.sampled_from([None, None, 1.0, -0.7, 0.0, 0.05])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.9])),
        with_lse=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_composition(dtype: torch.dtype, backend: str, device: str) -> None:
    @given(call=calls(dtype))
    def run(call: Call) -> None:
        check(call, backend, device)

    run()
