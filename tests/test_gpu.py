"""What can only be seen on a GPU: CUDA tensors through every public entry, against the float64 formula on the CPU."""

from __future__ import annotations

import copy
from unittest import mock

import bodies
import features
import float8_oracle
import oracle
import pytest
import softmax_oracle
import torch
from devices import FUSED_ON_GPU
from rotary_cases import SHAPES as ROTARY_SHAPES
from rotary_cases import WIDE as ROTARY_WIDE
from rotary_oracle import RotaryCall, RotaryShape, check_rotation
from test_determinism import COMBINATIONS as DETERMINISTIC
from torch import nn
from torch.nn import functional as F

import fastattn
from fastattn.bench.additive import ADDITIVE_SCENARIOS, make_additive_inputs
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
# D = 64 with more than one tile each way, and fewer key heads than query heads
WIDE = features.Shape(query_length=150, key_length=210, head_dim=64, value_dim=64)


def _skip_float32(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the cuda backend's attention has float16 and bfloat16")


def _name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if not SCENARIOS[s].dropout_p])
def test_features_against_the_cpu_formula(scenario: str, dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("dims", [(24, 24), (64, 40), (256, 16)], ids=str)
@pytest.mark.parametrize("scenario", ADDITIVE_SCENARIOS)
def test_additive_attention(scenario: str, dims: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    shape = Shape(batch=2, heads=3, query_length=70, key_length=101, head_dim=dims[0], value_dim=dims[1])
    case = Case("gpu", scenario, shape, dtype)
    on_cpu, on_gpu = make_additive_inputs(case, "cpu"), make_additive_inputs(case, DEVICE)
    mask = fastattn.Causal() if on_gpu.causal else None

    def forward() -> torch.Tensor:
        return fastattn.additive_attention(*on_gpu.leaves.values(), mask=mask, backend=backend)

    values = evaluate(Prepared(forward, on_gpu.leaves, on_gpu.grad_out), gradients=True)
    checks = compare(on_cpu, expect(on_cpu, gradients=True), {name: t.cpu() for name, t in values.items()})
    wrong = [f"{c.name}: {c.error:.2e} over {c.budget:.2e}" for c in checks if not c.passed]
    assert not wrong, wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_the_one_philox_gives_on_the_cpu(backend: str) -> None:
    dtype, tolerance = (torch.float16, 4e-3) if backend == "cuda" else (torch.float32, 1e-5)
    query, key, value = (torch.randn(2, 3, 70, 32, device=DEVICE, dtype=dtype) for _ in range(3))
    p = 0.3
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=DEVICE)  # what the call below will draw
    torch.manual_seed(5)
    out = fastattn.attention(query, key, value, dropout_p=p, backend=backend)
    kept = keep_mask(seed.cpu(), p, torch.arange(6), torch.arange(70), range(70)).view(2, 3, 70, 70)
    assert 0.65 < kept.double().mean().item() < 0.75
    weights = (query.cpu().double() @ key.cpu().double().mT / 32**0.5).softmax(-1)
    expected = torch.where(kept, weights / (1 - p), 0.0) @ value.cpu().double()
    assert torch.allclose(out.cpu().double(), expected, atol=tolerance)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
def test_views_that_no_wide_access_fits(backend: str) -> None:
    """Rows that start at odd multiples of two bytes, and heads beside each other in memory."""
    whole = torch.randn(2, 33, 3, 65, device=DEVICE, dtype=torch.float16)
    query, key, value = (whole[..., n : n + 64].transpose(1, 2) for n in (0, 1, 1))
    out = fastattn.attention(query, key, value, backend=backend)
    expected = fastattn.attention(*(x.contiguous() for x in (query, key, value)), backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
def test_in_a_cuda_graph(backend: str) -> None:
    """Attention with its gradients, the softmax and the rotation: captured once, replayed on other numbers."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 96, 64, device=DEVICE, dtype=torch.float16) for _ in range(3))
    slopes, table = torch.rand(4, device=DEVICE), torch.randn(4, 9, device=DEVICE)
    angle = torch.randn(96, 32, device=DEVICE)
    leaves = [x.requires_grad_() for x in (query, key, value, slopes, table)]

    def step() -> list[torch.Tensor]:
        bias = fastattn.ALiBi(slopes) + fastattn.DistanceTable(table)
        out = fastattn.attention(query, key, value, mask=fastattn.Causal(), bias=bias, backend=backend)
        turned = fastattn.apply_rotary(query, key, angle.cos(), angle.sin(), backend=backend)
        weights = fastattn.masked_softmax(query @ key.mT, mask=fastattn.Causal(), bias=bias, backend=backend)
        loss = sum(x.float().square().sum() for x in (out, *turned, weights))
        return [out.detach(), *torch.autograd.grad(loss, leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # everything lazy is made outside of the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    replayed = [x.clone() for x in captured]
    for again, want in zip(replayed, step(), strict=True):
        assert torch.equal(again, want)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_stream(backend: str) -> None:
    """Work must follow the caller's stream: a long kernel there is what a wrong stream would overtake."""
    query = torch.randn(1, 4, 256, 64, device=DEVICE, dtype=torch.float16)
    expected = fastattn.attention(query * 3, query, query, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = fastattn.attention(query * 3, query, query, backend=backend)
    stream.synchronize()
    assert torch.allclose(out, expected, atol=1e-6)


# -- the kernels, one feature at a time --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("feature", features.FEATURES)
def test_attention_feature(feature: str, dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
    oracle.check(oracle.Call((feature,), WIDE, dtype), backend, DEVICE)


COMPOSITIONS = [
    ("causal", "t5_decoder", "rotary"),
    ("window", "alibi_batch", "key_lengths", "softcap"),
    ("prefix_lm", "dense_heads", "table", "sink"),
    ("documents_sorted", "bool_keys", "rotary_partial_interleaved"),
    ("causal", "documents", "dense_infinite", "sink_batch"),
]


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("names", COMPOSITIONS, ids="+".join)
def test_attention_composition(names: tuple[str, ...], dtype: torch.dtype, dropout_p: float, backend: str) -> None:
    _skip_float32(backend, dtype)
    oracle.check(oracle.Call(names, WIDE, dtype, dropout_p=dropout_p), backend, DEVICE)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (40, 96), (96, 40), (128, 128), (192, 192), (256, 256)], ids=str)
def test_attention_head_dims(dims: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
    shape = features.Shape(query_length=150, key_length=210, head_dim=dims[0], value_dim=dims[1])
    oracle.check(oracle.Call(("causal", "alibi"), shape, dtype), backend, DEVICE)


SPANS = [("documents_sorted", "causal"), ("bool_blocks",), ("bool_bands", "table"), ("documents", "dense_heads")]


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("names", SPANS, ids="+".join)
def test_masks_that_are_read_before(names: tuple[str, ...], dtype: torch.dtype, backend: str) -> None:
    """Enough queries and keys for a look at what blocks of them see, and for tiles that nobody sees, or everybody."""
    _skip_float32(backend, dtype)
    oracle.check(oracle.Call(names, features.Shape(2, 4, 2, 530, 600, 64, 64), dtype), backend, DEVICE)


@pytest.mark.parametrize(
    "names", [(), ("causal",), ("causal", "t5_decoder", "alibi", "sink"), *SPANS[:2]], ids="+".join
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_sm_90a(dim: int, dtype: torch.dtype, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that run only when asked for, with several tiles of queries and keys for each multiprocessor."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernels need a GPU of capability 9.0")
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    call = oracle.Call(names, features.Shape(3, 16, 4, 700, 900, dim, dim), dtype)
    operands = (call.leaves[name].to(DEVICE).requires_grad_() for name in ("query", "key", "value"))
    plan = fastattn.explain(*operands, backend="cuda").plan
    assert plan["kernel"] == "hopper_forward"
    assert (plan["backward_q"]["kernel"], plan["backward_kv"]["kernel"]) == ("hopper_backward_q", "hopper_backward_kv")
    oracle.check(call, "cuda", DEVICE)


@pytest.mark.parametrize("names", [(), ("causal",), ("causal", "documents", "sink")], ids="+".join)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_float8_sm_90a(dim: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of 8-bit operands, several tiles of queries and keys for each multiprocessor."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernels need a GPU of capability 9.0")
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    call = float8_oracle.Float8Call(names, features.Shape(3, 16, 4, 700, 900, dim, dim))
    operands = [x.to(DEVICE) for x in call.operands]
    assert fastattn.explain(*operands, backend="cuda").plan["kernel"] == "hopper_forward_e4m3"
    float8_oracle.check_float8(call, "cuda", DEVICE)
    assert "float8" in fastattn.last_call().kernel


@pytest.mark.parametrize("backend", [None, *FUSED_ON_GPU])
def test_float8_dequantized(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_CUDA_HOPPER", raising=False)
    call = float8_oracle.Float8Call(("causal",), features.Shape(2, 4, 2, 70, 90, 64, 64))
    float8_oracle.check_float8(call, backend, DEVICE, kernel=False)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("feature", [*features.MASKS, *features.BIASES])
def test_softmax_feature(feature: str, dtype: torch.dtype, backend: str) -> None:
    shape = features.Shape(heads=3, query_length=33, key_length=301)
    softmax_oracle.check(softmax_oracle.SoftmaxCall((feature,), shape, dtype), backend, DEVICE)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("length", [1, 7, 129, 1000, 4096, 16384, 16385, 40_000])
def test_softmax_row_length(length: int, dtype: torch.dtype, backend: str) -> None:
    """Up to 16384 columns a row stays in registers; longer ones go by in parts."""
    shape = features.Shape(batch=1, heads=2, query_length=3, key_length=length)
    for names in ((), ("window_left", "alibi", "table")):
        softmax_oracle.check(softmax_oracle.SoftmaxCall(names, shape, dtype, scale=0.3), backend, DEVICE)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("positions", ["none", "shared", "each"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [*ROTARY_SHAPES, *ROTARY_WIDE])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_rotation(dtype: torch.dtype, shape: str, interleaved: bool, positions: str, backend: str) -> None:
    chosen, batched = (ROTARY_SHAPES | ROTARY_WIDE)[shape], positions == "each"
    call = RotaryCall(chosen, dtype, interleaved=interleaved, positions=positions, batched=batched)
    check_rotation(call, backend, DEVICE)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_rotation_in_place(dtype: torch.dtype, interleaved: bool, backend: str) -> None:
    bodies.rotation_in_place_inside_guard_bands(backend, DEVICE, dtype, interleaved)


# -- where operands lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_strided_views(dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
    bodies.strided_views(backend, DEVICE, dtype)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_reads_and_writes_stay_inside(dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
    bodies.reads_and_writes_stay_inside(backend, DEVICE, dtype)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("columns", [301, 20_000])
def test_softmax_inside_guard_bands(columns: int, backend: str) -> None:
    shape = features.Shape(heads=2, query_length=7, key_length=columns)
    bodies.softmax_inside_guard_bands(backend, DEVICE, shape)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
def test_offsets_beyond_32_bits(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 10 GB of GPU memory that is free")
    bodies.offsets_beyond_32_bits(backend, DEVICE)


# -- the same every time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
def test_same_dropout_as_the_cpu_backend(backend: str) -> None:
    bodies.same_dropout_as_the_cpu_backend(backend, DEVICE, torch.float16)


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("names", DETERMINISTIC, ids="+".join)
def test_the_same_bits_on_every_run(names: tuple[str, ...], dtype: torch.dtype, backend: str) -> None:
    _skip_float32(backend, dtype)
    bodies.the_same_bits_on_every_run(backend, DEVICE, oracle.Call(names, WIDE, dtype))


@pytest.mark.parametrize("backend", FUSED_ON_GPU)
@pytest.mark.parametrize("names", [("causal", "alibi", "table"), ("dense_keys", "table_batch")], ids="+".join)
def test_softmax_has_the_same_bits_on_every_run(names: tuple[str, ...], backend: str) -> None:
    call = softmax_oracle.SoftmaxCall(names, features.Shape(query_length=70, key_length=300))
    bodies.the_same_bits_on_every_run(backend, DEVICE, call)


# -- launches ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("triton" not in BACKENDS, reason="the triton backend is not available")
def test_the_short_way_of_launching_computes_the_same() -> None:
    """The second call goes past Triton's own launch, with operands elsewhere and of another length."""
    from triton.runtime.jit import JITFunction

    from fastattn.triton_kernels import launcher

    if not launcher.short():
        pytest.skip("this version of Triton is launched in its own way")
    calls = [oracle.Call(("causal", "alibi", "sink"), features.Shape(query_length=n, key_length=n)) for n in (33, 35)]
    calls[0].fused("triton", DEVICE)
    with mock.patch.object(JITFunction, "run", side_effect=AssertionError("not the short way")):
        oracle.check(calls[1], "triton", DEVICE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", FUSED_ON_GPU)
def test_on_a_device_that_is_not_the_current_one(backend: str) -> None:
    oracle.check(oracle.Call(("causal", "alibi"), dtype=torch.float16), backend, "cuda:1")
    check_rotation(RotaryCall(RotaryShape()), backend, "cuda:1")
    softmax_oracle.check(softmax_oracle.SoftmaxCall(("causal",)), backend, "cuda:1")
