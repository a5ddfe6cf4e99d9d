"""torch.compile, torch.export, activation checkpointing and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from features import Shape
from oracle import Call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _loss(call: Call, backend: str) -> Callable[..., Tensor]:
    def loss(*leaves: Tensor) -> Tensor:
        named = dict(zip(call.leaves, leaves, strict=True))
        out, lse = fastattn.attention(
            named["query"], named["key"], named["value"], **call.keywords(named), return_lse=True, backend=backend
        )
        return (out * out).sum() + lse.where(lse.isfinite(), 0.0).sin().sum()

    return loss


def _grads(loss: Callable[..., Tensor], call: Call) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in call.leaves.values()]
    torch.manual_seed(0)
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


COMBINATIONS = [
    (),
    ("causal", "alibi", "rotary"),
    ("window", "table", "sink", "softcap"),
    ("key_lengths", "dense_heads", "bool_keys"),
    ("documents", "prefix_lm", "t5_decoder", "rotary_interleaved"),
]


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_compile_fullgraph(features: tuple[str, ...], backend: str, device: str) -> None:
    """No graph break in forward or backward, and the eager numbers."""
    call = Call(features, Shape(query_length=9, key_length=9))
    loss = _loss(call, backend)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, want in zip(_grads(compiled, call), _grads(loss, call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compile_inductor(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch operations, whose inductor code is torch's; aot_eager covers the tracing")
    call = Call(("causal", "alibi"), Shape(query_length=9, key_length=9))
    loss = _loss(call, backend)
    compiled = torch.compile(loss, fullgraph=True)
    for got, want in zip(_grads(compiled, call), _grads(loss, call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_compile_with_the_default_backend(only_backend: str, device: str) -> None:
    """backend=None chooses while tracing, without a graph break."""
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, mask=fastattn.Causal())

    torch.testing.assert_close(f(q, k, v), fastattn.attention(q, k, v, mask=fastattn.Causal()))


def test_compile_dynamic_shapes_does_not_recompile(backend: str, device: str) -> None:
    """One graph serves every length: three lengths, no further compilation after the first."""
    if backend == "reference":
        pytest.skip("plain torch operations; tracing them with symbols takes half a minute")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    slopes = fastattn.alibi_slopes(4)

    def f(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        bias, mask = fastattn.ALiBi(slopes), fastattn.Causal() & fastattn.SlidingWindow(5, None)
        return fastattn.attention(q, k, v, mask=mask, bias=bias, backend=backend)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    compilations = 0
    for batch, length, keys in ((3, 5, 9), (5, 7, 11), (6, 33, 65)):  # equal sizes would be taken for the same symbol
        q, k, v = (torch.randn(batch, h, s, 8, requires_grad=True) for h, s in ((4, length), (2, keys), (2, keys)))
        got, want = compiled(q, k, v, slopes), f(q, k, v, slopes)
        compilations = compilations or counter.frame_count
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == compilations


def test_compile_dropout(backend: str, device: str) -> None:
    """Dropout inside a graph: forward and backward agree on the mask, calls differ, the rate is right."""
    q = torch.zeros(2, 2, 64, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(v: Tensor) -> Tensor:
        return fastattn.attention(q, q, v, dropout_p=0.25, backend=backend)

    eye = torch.eye(64).expand(2, 2, 64, 64).clone().requires_grad_()
    first, second = f(eye), f(eye)
    assert not torch.equal(first, second)
    assert abs((first != 0).float().mean().item() - 0.75) < 0.03
    # d sum(W V * G) / dV = W^T G: the same W
    g = torch.randn(2, 2, 64, 64)
    (grad,) = torch.autograd.grad(first, eye, g)
    torch.testing.assert_close(grad, first.detach().transpose(-1, -2) @ g, atol=1e-5, rtol=1e-4)


class Block(nn.Module):
    def __init__(self, backend: str, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.slopes = nn.Parameter(fastattn.alibi_slopes(2))
        self.backend, self.dropout_p = backend, dropout_p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mask, bias = fastattn.Causal(), fastattn.ALiBi(self.slopes)
        y = fastattn.attention(q, k, v, mask=mask, bias=bias, dropout_p=self.dropout_p, backend=self.backend)
        return x + self.out(y.transpose(1, 2).flatten(-2))


def test_export(backend: str, device: str) -> None:
    """A dynamic length survives; the exported program gives the eager numbers at another length."""
    block = Block(backend).eval()
    length = torch.export.Dim("length", min=2, max=256)
    program = torch.export.export(block, (torch.randn(2, 9, 16),), dynamic_shapes={"x": {1: length}})
    x = torch.randn(2, 31, 16)
    torch.testing.assert_close(program.module()(x), block(x))
    if backend != "reference":
        assert any(f"fastattn.{backend}_forward" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_activation_checkpointing(dropout_p: float, use_reentrant: bool, backend: str, device: str) -> None:
    """The recomputed forward draws the dropout mask of the first one."""
    block = Block(backend, dropout_p)
    x = torch.randn(2, 13, 16, requires_grad=True)
    results = []
    for run in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        out = run()
        block.zero_grad()
        (out * out).sum().backward()
        results.append([out.detach(), x.grad.clone(), *[p.grad.clone() for p in block.parameters()]])
        x.grad = None
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str, device: str) -> None:
    """float32 and mixed operands run in the autocast dtype, as torch's do; gradients come back in float32."""
    leaves = [torch.randn(2, 2, 7, 8, requires_grad=True) for _ in range(3)]
    table = torch.randn(2, 9, requires_grad=True)
    q, k, v = leaves
    with torch.autocast(device, dtype):
        out = fastattn.attention(q, k.to(dtype), v, bias=fastattn.DistanceTable(table), backend=backend)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == want.dtype == dtype
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), [*leaves, table]))
    full = fastattn.attention(q, k, v, bias=fastattn.DistanceTable(table), backend=backend)
    assert full.dtype == torch.float32
    torch.testing.assert_close(out.float(), full, atol=0.05, rtol=0)
    with torch.autocast(device, dtype):
        double = fastattn.attention(q.double(), k.double(), v.double(), backend=backend)
    assert double.dtype == torch.float64


def test_training_step_under_autocast_and_compile(backend: str, device: str) -> None:
    block = Block(backend)
    x = torch.randn(2, 9, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    losses = []
    for module in (block, compiled):
        with torch.autocast(device, torch.bfloat16):
            loss = module(x).float().pow(2).mean()
        block.zero_grad()
        loss.backward()
        losses.append((loss.detach(), block.slopes.grad.clone()))
    for got, want in zip(*losses, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=5e-2)


class _Disentangled(nn.Module):
    """With relative embeddings of its own, as row and column tables."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(12, 32))
        self.bias = fastattn.nn.DisentangledBias(32, 4, max_distance=16, buckets=8)

    def forward(self) -> fastattn.Bias:
        return self.bias(self.embeddings)


ENCODINGS: dict[str, Callable[[], nn.Module]] = {
    "ALiBi": lambda: fastattn.nn.ALiBi(4, sides="asymmetric", learned=True),
    "KERPLE": lambda: fastattn.nn.KERPLE(4),
    "FIRE": lambda: fastattn.nn.FIRE(4),
    "TransformerXL-columns": lambda: fastattn.nn.TransformerXLBias(4, 8, 6, route="columns"),
    "TransformerXL-dense": lambda: fastattn.nn.TransformerXLBias(4, 8, 6, route="dense"),
    "TransformerXL-table": lambda: fastattn.nn.TransformerXLBias(4, 8, 6, clamp=3),
    "Disentangled": _Disentangled,
    "Decomposed": lambda: fastattn.nn.DecomposedBias(8, (3, 4)),
    "SwinV2": lambda: fastattn.nn.SwinV2Bias(4, (3, 4)),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_fullgraph(name: str, backend: str, device: str) -> None:
    module = ENCODINGS[name]()
    q, k, v = (torch.randn(1, 4, 12, 8) for _ in range(3))

    def loss() -> Tensor:
        return fastattn.attention(q, k, v, bias=module(), backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    parameters = list(module.parameters())
    results = [torch.autograd.grad(f(), parameters) for f in (compiled, loss)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
