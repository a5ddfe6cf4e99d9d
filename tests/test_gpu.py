"""What can only be seen on a GPU: CUDA tensors through every public entry, against the float64 formula on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn.bench.gate import compare, evaluate, expect
from fastattn.bench.peers import Prepared
from fastattn.bench.scenarios import SCENARIOS, Case, Shape, make_inputs
from fastattn.nn import MultiheadAttention, replace_attention
from fastattn.philox import keep_mask

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SHAPES = (
    Shape(batch=2, heads=4, query_length=65, key_length=65, head_dim=40),
    Shape(batch=3, heads=6, kv_heads=2, query_length=33, key_length=129, head_dim=64, value_dim=24),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = [backend.name for backend in fastattn.backends() if backend.available and backend.name != "cpu"]


def _name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not SCENARIOS[s].dropout_p])
def test_features_against_the_cpu_formula(scenario: str, dtype: torch.dtype, backend: str) -> None:
    for shape in SHAPES:
        case = Case("gpu", scenario, shape, dtype)
        on_cpu, on_gpu = make_inputs(case, "cpu"), make_inputs(case, DEVICE)
        arguments = SCENARIOS[scenario].arguments(shape, on_gpu.extras)

        def forward(inputs=on_gpu, arguments=arguments):
            function = SCENARIOS[scenario].function
            return function(inputs.query, inputs.key, inputs.value, backend=backend, **arguments)

        values = evaluate(Prepared(forward, on_gpu.leaves(), on_gpu.grad_out), gradients=True)
        checks = compare(on_cpu, expect(on_cpu, gradients=True), {name: t.cpu() for name, t in values.items()})
        wrong = [f"{c.name}: {c.error:.2e} over {c.budget:.2e}" for c in checks if not c.passed]
        assert not wrong, f"{shape}: {wrong}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_the_one_philox_gives_on_the_cpu(backend: str) -> None:
    query, key, value = (torch.randn(2, 3, 70, 32, device=DEVICE) for _ in range(3))
    p = 0.3
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=DEVICE)  # what the call below will draw
    torch.manual_seed(5)
    out = fastattn.attention(query, key, value, dropout_p=p, backend=backend)
    kept = keep_mask(seed.cpu(), p, torch.arange(6), torch.arange(70), range(70)).view(2, 3, 70, 70)
    assert 0.65 < kept.double().mean().item() < 0.75
    weights = (query.cpu().double() @ key.cpu().double().mT / 32**0.5).softmax(-1)
    expected = torch.where(kept, weights / (1 - p), 0.0) @ value.cpu().double()
    assert torch.allclose(out.cpu().double(), expected, atol=1e-5)


def test_dispatch_and_explain_on_cuda_tensors() -> None:
    query = torch.randn(1, 2, 16, 32, device=DEVICE)
    explanation = fastattn.explain(query, query, query, mask=fastattn.Causal())
    assert explanation.backend in BACKENDS
    assert "cpu" in explanation.refusals, "the CPU backend must say why it does not take CUDA tensors"
    fastattn.attention(query, query, query, mask=fastattn.Causal())
    assert fastattn.last_call().backend == explanation.backend
    with pytest.raises(fastattn.UnsupportedError):
        fastattn.attention(query, query, query, backend="cpu")


def test_mixed_devices_are_an_error() -> None:
    query = torch.randn(1, 2, 16, 32, device=DEVICE)
    with pytest.raises((ValueError, TypeError), match="key"):
        fastattn.attention(query, query.cpu(), query)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("variant", ["plain", "causal", "bool", "float", "gqa"])
def test_sdpa_drop_in(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = 2 if variant == "gqa" else 4
    query = torch.randn(2, 4, 33, 64, device=DEVICE, dtype=dtype)
    key, value = (torch.randn(2, heads, 47, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    keywords = {
        "plain": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.rand(2, 1, 33, 47, device=DEVICE) < 0.7},
        "float": {"attn_mask": torch.randn(33, 47, device=DEVICE, dtype=dtype)},
        "gqa": {"enable_gqa": True},
    }[variant]
    ours = fastattn.scaled_dot_product_attention(query, key, value, **keywords)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()}
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **wide)
    theirs = F.scaled_dot_product_attention(query, key, value, **keywords)
    budget = 2 * (theirs.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_replaced_encoder(training: bool) -> None:
    """In eval mode torch would hand the weights to a fused operator: last_call proves that our code ran."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, device=DEVICE)
    model = nn.TransformerEncoder(layer, 2).train(training)
    stock = copy.deepcopy(model)
    report = replace_attention(model)
    assert len(report.replaced) == 2
    x = torch.randn(3, 20, 64, device=DEVICE)
    padding = torch.arange(20, device=DEVICE) >= torch.tensor([20, 13, 7], device=DEVICE)[:, None]
    before = fastattn.last_call()
    with torch.set_grad_enabled(training):
        ours, theirs = model(x, src_key_padding_mask=padding), stock(x, src_key_padding_mask=padding)
    assert fastattn.last_call() is not None
    assert fastattn.last_call() is not before
    assert torch.allclose(ours[~padding], theirs[~padding], atol=2e-4)


def test_module_gradients_match_torch() -> None:
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(48, 4, batch_first=True, device=DEVICE)
    ours = MultiheadAttention.from_torch(copy.deepcopy(stock))
    x = torch.randn(2, 31, 48, device=DEVICE)
    results = []
    for module in (stock, ours):
        out, _ = module(x, x, x, need_weights=False)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))))
    for theirs, mine in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


def test_autocast() -> None:
    query, key, value = (torch.randn(1, 2, 40, 32, device=DEVICE) for _ in range(3))
    with torch.autocast("cuda", torch.bfloat16):
        out = fastattn.attention(query, key, value)
        theirs = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == theirs.dtype
    assert torch.allclose(out.float(), theirs.float(), atol=3e-2)


def test_compiled_without_graph_breaks() -> None:
    query, key, value = (torch.randn(1, 2, 40, 32, device=DEVICE) for _ in range(3))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q * 2, k, v, mask=fastattn.Causal()) + 1

    assert torch.allclose(torch.compile(step, fullgraph=True)(query, key, value), step(query, key, value), atol=1e-5)


def test_other_stream() -> None:
    """Work must follow the caller's stream: a long kernel there is what a wrong stream would overtake."""
    query = torch.randn(1, 4, 256, 64, device=DEVICE)
    expected = fastattn.attention(query * 3, query, query)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = fastattn.attention(query * 3, query, query)
    stream.synchronize()
    assert torch.allclose(out, expected, atol=1e-6)
