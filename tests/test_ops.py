"""The operators themselves: schema, fake implementation, and what they return, through torch's own checks."""

from __future__ import annotations

import pytest
import torch
from devices import GPU_BACKENDS
from features import FEATURES, Shape
from oracle import Call

import fastattn
from fastattn import functional, ops
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem

FUSED = [
    pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=b.reason)])
    for b in fastattn.backends()
    if b.name in ops.FUSED_BACKENDS and b.name not in GPU_BACKENDS
]
COMBINATIONS = [
    (),
    ("causal", "alibi", "rotary"),
    ("window", "table_batch", "sink", "softcap"),
    ("key_lengths", "prefix_lm", "dense_heads"),
    ("documents", "bool_keys", "dense_infinite", "sink_batch"),
]


def problem_of(call: Call) -> Problem:
    keywords = call.keywords(call.leaves)
    torch.manual_seed(0)
    return functional.lower(*[call.leaves[n] for n in ("query", "key", "value")], **keywords)


def test_schemas_follow_the_problem() -> None:
    """Argument for argument, so that a field added to one is added to all."""
    for name in ops.FUSED_BACKENDS:
        for op, lead in ((f"{name}_forward", 0), (f"{name}_backward", 5)):
            schema = getattr(torch.ops.fastattn, op).default._schema
            assert tuple(a.name for a in schema.arguments)[lead:] == FIELD_NAMES
            assert not schema.is_mutable
        assert len(schema.returns) == len(GRADIENT_FIELDS)


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name: str, dtype: torch.dtype, features: tuple[str, ...]) -> None:
    call = Call(features, Shape(query_length=5, key_length=7, head_dim=4, value_dim=6), dtype, dropout_p=0.2)
    args = problem_of(call).arguments()
    forward = getattr(torch.ops.fastattn, f"{name}_forward").default
    torch.library.opcheck(forward, args)
    out, lse, statistics = forward(*args)
    backward = getattr(torch.ops.fastattn, f"{name}_backward").default
    needs = sum(1 << bit for bit, field in enumerate(GRADIENT_FIELDS) if args[FIELD_NAMES.index(field)] is not None)
    for grad_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward, (torch.ones_like(out), grad_lse, out, statistics, needs, *args))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", FUSED)
def test_fake_tensors_have_the_strides_of_real_ones(name: str, layout: str) -> None:
    q, k, v = (
        torch.randn(2, 3, s, 4) if layout == "bhsd" else torch.randn(2, s, 3, 4).transpose(1, 2) for s in (5, 7, 7)
    )
    args = functional.lower(q, k, v, sink=torch.zeros(3), bias=fastattn.ALiBi(torch.ones(3))).arguments()
    forward, backward = (getattr(torch.ops.fastattn, f"{name}_{pass_}") for pass_ in ("forward", "backward"))

    def run(args: tuple[object, ...]) -> list[tuple[object, ...]]:
        out, lse, statistics = forward(*args)
        grads = backward(torch.empty_like(out), None, out, statistics, 0b1001111, *args)
        return [(tuple(t.shape), t.stride(), t.dtype) for t in (out, lse, statistics, *grads)]

    with torch._subclasses.FakeTensorMode() as mode:
        fake = run(tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert fake == run(args)


@pytest.mark.parametrize("name", FUSED)
def test_only_needed_gradients_are_computed(name: str) -> None:
    """A gradient that is not asked for comes back empty, and asking for fewer changes no bit of the others."""
    features = ("alibi", "table", "dense_heads", "sink", "causal", "deberta")
    problem = problem_of(Call(features, Shape(query_length=9, key_length=40)))
    assert all(getattr(problem, field) is not None for field in GRADIENT_FIELDS)
    args = problem.arguments()
    forward, backward = (getattr(torch.ops.fastattn, f"{name}_{pass_}") for pass_ in ("forward", "backward"))
    out, _, statistics = forward(*args)
    grad_out = torch.randn_like(out)
    everything = backward(grad_out, None, out, statistics, (1 << len(GRADIENT_FIELDS)) - 1, *args)
    for bit in range(len(GRADIENT_FIELDS)):
        grads = backward(grad_out, None, out, statistics, 1 << bit, *args)
        for other, grad in enumerate(grads):
            if other == bit:
                assert torch.equal(grad, everything[bit]), GRADIENT_FIELDS[bit]
            else:
                assert grad.shape == (0,), GRADIENT_FIELDS[other]


@pytest.mark.parametrize("name", FUSED)
def test_values_that_cannot_be_checked_are_clamped(name: str) -> None:
    """Lengths, prefixes and offsets far out of range, past Python's checks: nothing is read out of bounds."""
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    base = functional.lower(q, k, v)
    forward = getattr(torch.ops.fastattn, f"{name}_forward")
    big = 2**62

    def run(**fields: object) -> torch.Tensor:
        arguments = {**dict(zip(FIELD_NAMES, base.arguments(), strict=True)), **fields}
        return forward(*[arguments[n] for n in FIELD_NAMES])[0]

    plain = run()
    assert torch.equal(run(key_lengths=torch.tensor([big, 8])), plain)
    assert (run(key_lengths=torch.tensor([-big, -1])) == 0).all()
    assert torch.equal(run(prefix_lengths=torch.tensor([big, 1000])), plain)
    cos, sin = torch.ones(4, 2), torch.zeros(4, 2)
    rotated = {"query_cos": cos[None], "query_sin": sin[None], "key_cos": cos[None], "key_sin": sin[None]}
    for offset in (-big, -1, 3, 1000, big):
        torch.testing.assert_close(run(query_offset=offset, **rotated), plain)
        torch.testing.assert_close(run(query_offsets=torch.tensor([offset, 0]), **rotated), plain)
    table = torch.zeros(1, 2, 5)
    for offset in (-(2**40), 2**40):
        torch.testing.assert_close(run(query_offset=offset, table=table, table_left=2), plain)


def test_every_feature_reaches_its_field() -> None:
    """What the tests call a feature is a feature of the problem: nothing is lowered to nothing."""
    for name in FEATURES:
        problem = problem_of(Call((name,), Shape(batch=2)))
        if name == "rotary_learned":
            continue  # rotates outside the kernel while gradients are enabled, inside it here
        assert problem.features(), name
