"""fastattn.nn.MultiheadAttention as a citizen: compile, export, vmap, autocast, hooks, copies, weights."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

import fastattn
from fastattn.nn import MultiheadAttention, core

N, L, E, H = 3, 5, 8, 2
TORCH = torch.nn.MultiheadAttention


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    theirs = TORCH(E, H, **options)
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def padding(batch: int = N, length: int = L) -> Tensor:
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, length - 2 :] = True
    return mask


# Compilers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(dynamic: bool, need_weights: bool) -> None:
    """One graph, forward and backward, for several lengths."""
    module = MultiheadAttention(E, H, batch_first=True, add_zero_attn=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = list(module.parameters())
    for length in (5, 6, 9):
        x, mask = torch.randn(N, length, E, requires_grad=True), torch.randn(length, length, requires_grad=True)
        results = []
        for run in (compiled, module):
            out, weights = run(x, x, x, attn_mask=mask, key_padding_mask=padding(N, length), need_weights=need_weights)
            loss = out.square().sum() if weights is None else out.square().sum() + weights.square().sum()
            results.append([out, *torch.autograd.grad(loss, [x, mask, *parameters])])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_compile_inference(need_weights: bool) -> None:
    module = MultiheadAttention(E, H, batch_first=True).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, L, E)
    keywords = {"key_padding_mask": padding(), "is_causal": True, "need_weights": need_weights}
    torch.testing.assert_close(compiled(x, x, x, **keywords), module(x, x, x, **keywords))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_dropout_and_causal() -> None:
    module = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, 40, E)
    out, weights = compiled(x, x, x, is_causal=True, average_attn_weights=False)
    seen = weights[..., torch.ones(40, 40, dtype=torch.bool).tril()]
    assert 0.4 < (seen != 0).float().mean() < 0.6
    assert weights.triu(1).count_nonzero() == 0
    assert out.isfinite().all()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_a_whole_encoder() -> None:
    """With a padding mask, in inference, after the surgery: torch's own encoder must trace in one graph.  Padding is
    computed in it, as in torch's."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    fastattn.nn.replace_attention(model)
    x = torch.randn(N, L, E)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = (m(x, src_key_padding_mask=padding()) for m in (compiled, model))
    torch.testing.assert_close(got[~padding()], expected[~padding()])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.attention(x, x, x, key_padding_mask=mask)

    model = Model().eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    shapes = {"x": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    program = torch.export.export(model, (torch.randn(N, L, E), padding()), strict=strict, dynamic_shapes=shapes)
    x, mask = torch.randn(2, 9, E), padding(2, 9)
    for a, b in zip(program.module()(x, mask), model(x, mask), strict=True):
        torch.testing.assert_close(a, b)


def test_symbolic_trace_keeps_the_module_a_leaf() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.attention(x, x, x, need_weights=False)
            return x + out

    block = Block()
    traced = torch.fx.symbolic_trace(block)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention"]
    x = torch.randn(N, L, E)
    torch.testing.assert_close(traced(x), block(x))


# Transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}])
def test_vmap_over_an_ensemble(options: dict[str, bool], need_weights: bool) -> None:
    modules = [MultiheadAttention(E, H, batch_first=True, **options) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")
    x = torch.randn(N, L, E)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        masks = {"key_padding_mask": padding(), "need_weights": need_weights}
        results = torch.func.functional_call(skeleton, (parameters, buffers), (x, x, x), masks)
        return tuple(r for r in results if r is not None)

    stacked = torch.vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    for i, module in enumerate(modules):
        expected = module(x, x, x, key_padding_mask=padding(), need_weights=need_weights)
        for a, b in zip(stacked, expected, strict=False):
            torch.testing.assert_close(a[i], b)


def test_per_sample_gradients() -> None:
    """vmap(grad): the gradient of every sample, also of a float mask that all samples share."""
    module = MultiheadAttention(E, H, batch_first=True)
    parameters = {**{k: v.detach() for k, v in module.named_parameters()}, "mask": torch.randn(L, L)}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        own = {name: value for name, value in parameters.items() if name != "mask"}
        out, weights = torch.func.functional_call(module, own, (x, x, x), {"attn_mask": parameters["mask"]})
        return out.square().sum() + weights.square().sum()

    samples = torch.randn(N, 2, L, E)
    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        for name, alone in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(together[name][i], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 6}])
def test_autocast(options: dict[str, Any], need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True, **options)
    query, key = torch.randn(N, L, E), torch.randn(N, L, ours.kdim)
    value = torch.randn(N, L, E)
    for mask in (None, torch.randn(L, L), torch.ones(L, L, dtype=torch.bool).triu(1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = theirs(query, key, value, attn_mask=mask, need_weights=need_weights)
            got = ours(query, key, value, attn_mask=mask, need_weights=need_weights)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    (got[0].float().sum()).backward()
    assert ours.out_proj.weight.grad.dtype == torch.float32


def test_tensor_types_with_their_own_handlers_see_torchs_function() -> None:
    class Logging(Tensor):
        seen: ClassVar[list[Any]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(L, N, E).as_subclass(Logging)
    MultiheadAttention(E, H)(x, x, x)
    assert torch.nn.functional.multi_head_attention_forward in Logging.seen


@pytest.mark.parametrize("context", ["default device", "function mode"])
def test_modes_do_not_bypass_the_kernels(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", None)
    mode = torch.device("cpu") if context == "default device" else torch.overrides.BaseTorchFunctionMode()
    x = torch.randn(L, N, E)
    with mode:
        assert MultiheadAttention(E, H)(x, x, x)[0].shape == x.shape


# Nested tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_tensors_take_torchs_path(need_weights: bool) -> None:
    theirs, ours = (module.eval() for module in pair(batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        expected, got = (m(x, x, x, need_weights=need_weights) for m in (theirs, ours))
    assert got[0].is_nested
    torch.testing.assert_close(got[0].to_padded_tensor(0.0), expected[0].to_padded_tensor(0.0))
    assert (got[1] is None) == (expected[1] is None)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_other_nested_calls_end_as_torchs_do(layout: torch.layout) -> None:
    """With gradients torch refuses nested tensors; some versions take the jagged layout."""
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)], layout=layout)
    ends = []
    for module in pair(batch_first=True):
        try:
            ends.append(module(x, x, x)[0].to_padded_tensor(0.0))
        except AssertionError as error:
            ends.append(str(error))
    if isinstance(ends[0], str):
        assert "does not support NestedTensor" in ends[0]
        assert ends[1] == ends[0]
    else:
        torch.testing.assert_close(ends[1], ends[0])


# Copies, hooks, weights ---------------------------------------------------------------------------------------------


def test_copies_and_pickles() -> None:
    module = MultiheadAttention(E, H, dropout=0.1, add_bias_kv=True).eval()
    x = torch.randn(L, N, E)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert type(other) is MultiheadAttention
        assert other.in_proj_weight is not module.in_proj_weight
        torch.testing.assert_close(other(x, x, x), module(x, x, x))


def test_old_pickles_get_the_attribute_they_lack() -> None:
    module = MultiheadAttention(E, H)
    state = module.__getstate__()
    del state["_qkv_same_embed_dim"]
    revived = MultiheadAttention.__new__(MultiheadAttention)
    revived.__setstate__(state)
    assert revived._qkv_same_embed_dim is True


def test_hooks_run_also_on_the_output_projection() -> None:
    module = MultiheadAttention(E, H)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("pre"))
    module.register_forward_hook(lambda *_: calls.append("post"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.out_proj.register_forward_hook(lambda *_: calls.append("out_proj"))
    x = torch.randn(L, N, E, requires_grad=True)
    module(x, x, x)[0].sum().backward()
    assert calls == ["pre", "out_proj", "post", "backward"]


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_pruning(name: str) -> None:
    theirs, ours = pair()
    x = torch.randn(L, N, E, requires_grad=True)
    for module in (theirs, ours):
        prune.l1_unstructured(module, name, amount=0.5)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    ours(x, x, x)[0].sum().backward()
    grad = getattr(ours, f"{name}_orig").grad
    assert (grad[getattr(ours, f"{name}_mask") == 0] == 0).all()


def test_pruning_the_output_projection() -> None:
    _, ours = pair()
    prune.l1_unstructured(ours.out_proj, "weight", amount=0.5)
    x = torch.randn(L, N, E)
    before = ours(x, x, x)[0]
    with torch.no_grad():
        ours.out_proj.weight_orig.mul_(2.0)
    torch.testing.assert_close(ours(x, x, x)[0] - ours.out_proj.bias, 2 * (before - ours.out_proj.bias))


class _Double(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", ["in_proj_weight", "bias_k"])
def test_parametrizations(name: str) -> None:
    theirs, ours = pair(add_bias_kv=True)
    x = torch.randn(L, N, E)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, name, _Double())
        assert type(module).__name__ == "ParametrizedMultiheadAttention"
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))
    ours(x, x, x)[0].sum().backward()
    assert ours.parametrizations[name].original.grad.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(ours)(x, x, x), ours(x, x, x))
    parametrize.remove_parametrizations(ours, name)
    assert type(ours) is MultiheadAttention
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


def test_weight_norm_of_both_projections() -> None:
    theirs, ours = pair()
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "in_proj_weight")
        parametrizations.weight_norm(module.out_proj)
    x = torch.randn(L, N, E)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


def test_moves_like_any_module() -> None:
    module = MultiheadAttention(E, H, dtype=torch.float16, device="meta")
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module = MultiheadAttention(E, H).to(torch.bfloat16)
    x = torch.randn(L, N, E, dtype=torch.bfloat16)
    assert module(x, x, x)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_biases_of_another_precision() -> None:
    theirs, ours = (module.double().eval() for module in pair(batch_first=True))
    for module in (theirs, ours):
        module.in_proj_bias = torch.nn.Parameter(torch.randn_like(module.in_proj_bias).half())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, L, E, dtype=torch.float64)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x))


# from_torch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_from_torch_shares_and_leaves_the_original(training: bool) -> None:
    mha = TORCH(E, H, batch_first=True, add_bias_kv=True, dropout=0.0).train(training)
    mha.in_proj_bias.requires_grad_(False)
    calls: list[type] = []
    handle = mha.register_forward_hook(lambda module, *_: calls.append(type(module)))
    before = dict(vars(mha))
    ours = MultiheadAttention.from_torch(mha)
    assert type(mha) is TORCH
    assert dict(vars(mha)) == before
    assert type(ours) is MultiheadAttention
    assert ours.training is training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in mha.parameters()]
    assert ours.out_proj is mha.out_proj
    assert not ours.in_proj_bias.requires_grad
    x = torch.randn(N, L, E)
    torch.testing.assert_close(ours(x, x, x), mha(x, x, x))
    assert calls == [MultiheadAttention, TORCH]
    handle.remove()
    ours(x, x, x)
    assert len(calls) == 2, "the handle of a shared hook removes it from both"


def test_from_torch_keeps_parametrizations() -> None:
    mha = TORCH(E, H)
    parametrize.register_parametrization(mha, "in_proj_weight", _Double())
    ours = MultiheadAttention.from_torch(mha)
    assert isinstance(ours, MultiheadAttention)
    assert parametrize.is_parametrized(ours, "in_proj_weight")
    assert ours.parametrizations.in_proj_weight.original is mha.parametrizations.in_proj_weight.original
    x = torch.randn(L, N, E)
    torch.testing.assert_close(ours(x, x, x), mha(x, x, x))
    torch.testing.assert_close(copy.deepcopy(ours)(x, x, x), mha(x, x, x))


def test_from_torch_twin_can_change_alone() -> None:
    mha = TORCH(E, H)
    ours = MultiheadAttention.from_torch(mha)
    x = torch.randn(L, N, E)
    before = mha(x, x, x)
    parametrize.register_parametrization(ours, "in_proj_weight", _Double())
    torch.testing.assert_close(mha(x, x, x), before)
    assert "in_proj_weight" in dict(mha.named_parameters())


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), MultiheadAttention(E, H), None])
def test_from_torch_refuses(other: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.MultiheadAttention"):
        MultiheadAttention.from_torch(other)


def test_from_torch_refuses_a_forward_of_the_instance() -> None:
    mha = TORCH(E, H)
    mha.forward = lambda *args: None
    with pytest.raises(ValueError, match="overridden on the instance"):
        MultiheadAttention.from_torch(mha)


def test_modules_are_freed() -> None:
    """No cache and no registry keeps a module or its weights alive."""
    module = MultiheadAttention(E, H)
    x = torch.randn(L, N, E)
    module(x, x, x)
    gone = weakref.ref(module), weakref.ref(module.in_proj_weight)
    del module
    assert gone[0]() is None
    assert gone[1]() is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_projections_are_freed_before_the_output_projection(
    need_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result takes their memory: an inference call holds four tensors of the output's size at most, not five."""
    module, x = MultiheadAttention(E, H).eval(), torch.randn(L, N, E)
    made: list[weakref.ref[Tensor]] = []

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            made.extend(map(weakref.ref, (result,) if isinstance(result, Tensor) else result))
            return result

        return call

    monkeypatch.setattr(core, "project_heads", watched(core.project_heads))
    alive: list[int] = []
    module.out_proj.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in made)))
    with torch.no_grad():
        module(x, x, x, need_weights=need_weights)
    assert len(made) == 3
    assert alive == [0]


@pytest.mark.parametrize("where", ["class", "instance", "submodule"])
def test_an_encoding_is_found_wherever_it_is(where: str) -> None:
    slopes = fastattn.ALiBi(torch.tensor([0.5, 0.25]))

    class Own(MultiheadAttention):
        position = property(lambda self: slopes)  # type: ignore[assignment]

    torch.manual_seed(0)
    module = (Own if where == "class" else MultiheadAttention)(E, 2)
    if where == "instance":
        module.position = slopes
    if where == "submodule":
        module.position = fastattn.nn.ALiBi(2)
        slopes = module.position()
    torch.manual_seed(0)
    plain, x = MultiheadAttention(E, 2), torch.randn(L, N, E)
    assert torch.equal(module(x, x, x)[0], plain(x, x, x, position=slopes)[0])
    assert not torch.equal(module(x, x, x)[0], plain(x, x, x)[0])
