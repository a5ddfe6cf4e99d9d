"""Odd, tiny and empty sizes; every kind of stride; inputs left as they were."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import pytest
import torch
from features import Shape
from oracle import Call, check
from torch import Tensor

import fastattn

# mmap.MAP_NORESERVE, which Python names from 3.13 on
NORESERVE = 0x4000
LENGTHS = [0, 1, 2, 63, 65, 129]


@pytest.mark.parametrize("key_length", LENGTHS)
@pytest.mark.parametrize("query_length", LENGTHS)
@pytest.mark.parametrize(
    "features", [(), ("causal", "table", "softcap"), ("window", "dense_heads", "sink")], ids="+".join
)
def test_lengths(features: tuple[str, ...], query_length: int, key_length: int, backend: str, device: str) -> None:
    check(Call(features, Shape(query_length=query_length, key_length=key_length)), backend, device)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(batch=0),
        Shape(heads=0, kv_heads=0),
        Shape(heads=0, kv_heads=2),
        Shape(head_dim=0),
        Shape(value_dim=0),
        Shape(head_dim=0, value_dim=0),
        Shape(query_length=0),
        Shape(key_length=0),
        Shape(batch=0, query_length=0, key_length=0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "features", [(), ("causal", "alibi_batch"), ("key_lengths", "dense_full", "sink")], ids="+".join
)
def test_empty_sizes(features: tuple[str, ...], shape: Shape, backend: str, device: str) -> None:
    check(Call(features, shape), backend, device)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_keys_gives_zero_and_lse_of_the_sink(dropout_p: float, backend: str, device: str) -> None:
    q, k = torch.randn(2, 3, 5, 4, device=device), torch.randn(2, 3, 0, 4, device=device)
    out, lse = fastattn.attention(q, k, k, return_lse=True, dropout_p=dropout_p, backend=backend)
    assert (out == 0).all()
    assert (lse == math.inf).all()
    sink = torch.tensor([1.0, -2.0, 0.5], device=device)
    out, lse = fastattn.attention(q, k, k, sink=sink, return_lse=True, dropout_p=dropout_p, backend=backend)
    assert (out == 0).all()
    assert (lse == sink[None, :, None]).all()


def _bshd(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _every_other(x: Tensor, dim: int) -> Tensor:
    wide = torch.full([2 * n if d == dim % x.dim() else n for d, n in enumerate(x.shape)], math.nan, dtype=x.dtype)
    wide.narrow(dim, 0, 1)
    view = wide[tuple(slice(None, None, 2) if d == dim % x.dim() else slice(None) for d in range(x.dim()))]
    view.copy_(x)
    return view


def _inside(x: Tensor) -> Tensor:
    """A slice from the middle of a NaN-filled buffer: an out of bounds or padded read shows."""
    buffer = torch.full([n + 3 for n in x.shape], math.nan, dtype=x.dtype)
    view = buffer[tuple(slice(2, 2 + n) for n in x.shape)]
    view.copy_(x)
    return view


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "bshd": _bshd,
    "batch_inside": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "head_dim_outside": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "transposed_matrix": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_row": lambda x: _every_other(x, 2),
    "every_other_column": lambda x: _every_other(x, 3),
    "every_other_head": lambda x: _every_other(x, 1),
    "inside_a_buffer": _inside,
    "flipped_memory": lambda x: x.flip(2).contiguous().flip(2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Views of q, k, v, grad_out and of every dense tensor give the numbers that contiguous tensors give."""
    features = ("causal", "dense_full", "bool_full", "rotary")
    plain, viewed = Call(features, dtype=dtype), Call(features, dtype=dtype)
    viewed.leaves = {name: VIEWS[view](t) for name, t in viewed.leaves.items()}
    viewed.grad_out = VIEWS[view](viewed.grad_out)
    a, b = plain.fused(backend, device), viewed.fused(backend, device)
    tolerance = {"rtol": 0, "atol": 0} if backend != "reference" else {}  # torch's matmul picks its kernel by strides
    torch.testing.assert_close(b.out, a.out, **tolerance)
    for name in a.grads:
        torch.testing.assert_close(b.grads[name], a.grads[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_inputs(axis: int, backend: str, device: str) -> None:
    """Stride 0 anywhere: in q, k, v, the bias, the mask; the gradient reaches the unexpanded tensor summed."""
    torch.manual_seed(1)
    shape = [2, 4, 9, 8]
    small = [1 if d == axis else n for d, n in enumerate(shape)]
    leaves = [torch.randn(small, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]
    bias = torch.randn([1 if d == axis else n for d, n in enumerate([2, 4, 9, 9])], dtype=torch.float64, device=device)
    bias.requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64, device=device)

    def run(expand: Callable[[Tensor, list[int]], Tensor], backend: str) -> tuple[Tensor, ...]:
        q, k, v = (expand(x, shape) for x in leaves)
        out = fastattn.attention(q, k, v, bias=fastattn.DenseBias(expand(bias, [2, 4, 9, 9])), backend=backend)
        return (out, *torch.autograd.grad(out, [*leaves, bias], grad))

    got = run(lambda x, s: x.expand(s), backend)
    want = run(lambda x, s: x.expand(s).contiguous(), "reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_expanded_gradient(backend: str, device: str) -> None:
    """out.sum().backward() hands the kernel a gradient whose strides are all 0."""
    q, k, v = (torch.randn(2, 2, 5, 4, device=device, requires_grad=True) for _ in range(3))
    got = torch.autograd.grad(fastattn.attention(q, k, v, backend=backend).sum(), (q, k, v))
    want = torch.autograd.grad(fastattn.attention(q, k, v, backend="reference").sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["query", "key", "value", "bias", "mask", "grad_out"])
def test_strides_past_int32(which: str, backend: str, device: str) -> None:
    """Offsets of more than 2^31 elements, in 16 GiB of address space of which a few pages are touched."""
    if device != "cpu":
        pytest.skip("needs lazily committed memory")
    far = 2**31 + 64
    tensors = {
        "query": torch.randn(2, 1, 3, 4), "key": torch.randn(2, 1, 5, 4), "value": torch.randn(2, 1, 5, 4),
        "bias": torch.randn(2, 1, 3, 5), "mask": torch.rand(2, 1, 3, 5) < 0.7, "grad_out": torch.randn(2, 1, 3, 4),
    }  # fmt: skip

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = [x[n].detach().requires_grad_() for n in ("query", "key", "value", "bias")]
        out = fastattn.attention(
            *leaves[:3], bias=fastattn.DenseBias(leaves[3]), mask=fastattn.BoolMask(x["mask"]), backend=backend
        )
        return (out, *torch.autograd.grad(out, leaves, x["grad_out"]))

    want = run(tensors)
    plain = tensors[which]
    # An untyped storage from mmap is committed page by page; torch.empty would be filled with NaN by conftest.
    size = (far + plain[0].numel() + 64) * plain.element_size()
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    storage = torch.frombuffer(region, dtype=plain.dtype)
    tensors[which] = storage.as_strided(plain.shape, (far, *plain[0].contiguous().stride()))
    tensors[which].copy_(plain)
    got = run(tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bshd", [False, True])
def test_memory_layout_of_results(bshd: bool, backend: str, device: str) -> None:
    """The output and each gradient of the operands are laid out as the tensor they belong to."""
    make = (lambda x: _bshd(x)) if bshd else (lambda x: x)
    q, k, v = (make(torch.randn(2, 3, s, 4)).to(device).requires_grad_() for s in (5, 7, 7))
    out = fastattn.attention(q, k, v, backend=backend)
    if backend != "reference":
        assert (out.stride(1) < out.stride(2)) is bshd
        assert (out.transpose(1, 2) if bshd else out).is_contiguous()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape


def test_inputs_are_unchanged(backend: str, device: str) -> None:
    for features in (("rotary", "causal", "dense_full", "key_lengths", "sink"), ("table", "bool_full", "documents")):
        call = Call(features, dtype=torch.float32, dropout_p=0.2)
        before = {name: t.clone() for name, t in call.leaves.items()}
        grad_out = call.grad_out.clone()
        versions = {name: t._version for name, t in call.leaves.items()}
        call.fused(backend, device)
        for name, t in call.leaves.items():
            assert torch.equal(t, before[name]), name
            assert t._version == versions[name], name
        assert torch.equal(call.grad_out, grad_out)


def test_results_do_not_alias_inputs(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 1, 1, 4, device=device) for _ in range(3))
    out = fastattn.attention(q, k, v, backend=backend)
    kept = v.clone()
    out.add_(1.0)
    assert torch.equal(v, kept)


def test_fresh_memory_is_poisoned() -> None:
    """What conftest promises: no test passes because an unwritten element happened to be 0."""
    assert torch.empty(1000).isnan().all()
    assert torch.randn(3).new_empty(1000, dtype=torch.bfloat16).isnan().all()
    if torch.cuda.is_available():
        return
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert not torch.empty(1000).eq(0).any(), "native allocations"
