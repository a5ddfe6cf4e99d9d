"""fastattn.nn.replace_attention: what it replaces, what stays, the fused paths it turns off, and the way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune

import fastattn
from fastattn.nn import MultiheadAttention, replace_attention, restore_attention

N, L, E, H = 3, 6, 8, 2
TORCH = torch.nn.MultiheadAttention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every attention call that reaches a fastattn kernel."""
    seen: list[str] = []

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = run(*args, **named)
            if result is not None:  # as where there is no shortcut
                seen.append(fastattn.last_call().backend)
            return result

        return call

    for name in ("run", "run_shortcut"):
        monkeypatch.setattr(fastattn.dispatch, name, counting(getattr(fastattn.dispatch, name)))
    return seen


def make_layer(**options: Any) -> torch.nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return torch.nn.TransformerEncoderLayer(E, H, 16, **options)


def make_encoder(layers: int = 2, **options: Any) -> torch.nn.TransformerEncoder:
    encoder = torch.nn.TransformerEncoder(make_layer(**options), layers)
    with torch.no_grad():  # torch clones one layer: make them differ
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def right_padding() -> Tensor:
    return torch.arange(L) >= torch.tensor([L, 4, 2])[:, None]


class Block(torch.nn.Module):
    """Attention the way people write it by hand, with one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TORCH(E, H, batch_first=True)
        self.second = self.first
        self.other = torch.nn.ModuleList([TORCH(E, H, batch_first=True, dropout=0.0)])

    def forward(self, x: Tensor) -> Tensor:
        for attention in (self.first, self.second, *self.other):
            x = x + attention(x, x, x)[0]
        return x


# The fused inference paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "eval-no-grad", "inference"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_runs_our_kernel_in_every_mode(
    mode: str, padding: str, norm_first: bool, activation: str, calls: list[str]
) -> None:
    """Above all in eval without gradients, where torch's layer hands self_attn's weights to a fused operator."""
    model = make_encoder(norm_first=norm_first, activation=activation).train(mode == "train")
    original = copy.deepcopy(model)
    replace_attention(model)
    x = torch.randn(N, L, E)
    mask = {"none": None, "right": right_padding(), "left": right_padding().flip(1)}[padding]
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode in ("train", "eval")):
        got = model(x, src_key_padding_mask=mask)
        assert len(calls) == 2
        expected = original(x, src_key_padding_mask=mask)
        assert len(calls) == 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_without_the_surgery_the_fused_path_bypasses_a_module_but_says_so(calls: list[str]) -> None:
    """Why the switches are needed: assigned by hand, the module is not called in inference."""
    layer = make_layer().eval()
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(N, L, E)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="call fastattn.replace_attention"):
        bypassed = layer(x)
    assert calls == []
    holder = torch.nn.Sequential(layer)
    report = replace_attention(holder)
    assert report.left == {"0.self_attn": "is a fastattn module already"}
    assert report.fused_paths == ("0",)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), bypassed, atol=1e-5, rtol=1e-4)
    assert len(calls) == 1


def test_causal_encoder(calls: list[str]) -> None:
    """torch finds the mask causal and passes the hint; with padding the mask counts."""
    model = make_encoder().eval()
    original = copy.deepcopy(model)
    replace_attention(model)
    x, mask = torch.randn(N, L, E), torch.nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, L).masked_fill(right_padding(), float("-inf"))
    for padded in (None, padding):
        got, expected = (m(x, mask, src_key_padding_mask=padded) for m in (model, original))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 4


def test_every_layer_of_a_transformer(calls: list[str]) -> None:
    model = torch.nn.Transformer(E, H, 2, 3, 16, dropout=0.0, batch_first=True).eval()
    original = copy.deepcopy(model)
    report = replace_attention(model)
    assert len(report.replaced) == 2 + 3 * 2
    assert report.fused_paths == ("encoder.layers.0", "encoder.layers.1")
    assert report.stacks == ("encoder.layers.0", "encoder.layers.1", "encoder")
    source, target = torch.randn(N, L, E), torch.randn(N, L + 1, E)
    masks = {
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(L + 1),
        "src_key_padding_mask": right_padding(),
        "memory_key_padding_mask": right_padding(),
    }
    with torch.no_grad():
        got = model(source, target, **masks)
        assert len(calls) == 8
        torch.testing.assert_close(got, original(source, target, **masks), atol=1e-5, rtol=1e-4)


def test_a_decoder_layer_with_bool_masks(calls: list[str]) -> None:
    model = torch.nn.Sequential(torch.nn.TransformerDecoderLayer(E, H, 16, batch_first=True)).eval()
    original = copy.deepcopy(model)
    replace_attention(model)
    x, memory = torch.randn(N, L, E), torch.randn(N, 4, E)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    with torch.no_grad():
        got, expected = (
            m[0](x, memory, tgt_mask=causal, tgt_key_padding_mask=right_padding(), tgt_is_causal=True)
            for m in (model, original)
        )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2


def test_odd_heads_biasless_and_custom_layers(calls: list[str]) -> None:
    """Layers that never had a fused path are replaced all the same."""
    layers = [
        torch.nn.TransformerEncoderLayer(9, 3, 16, batch_first=True),
        torch.nn.TransformerEncoderLayer(9, 3, 16, batch_first=True, bias=False),
        torch.nn.TransformerEncoderLayer(9, 3, 16, batch_first=True, activation=torch.tanh),
        torch.nn.TransformerEncoderLayer(9, 3, 16),
    ]
    model = torch.nn.Sequential(*layers).eval()
    original = copy.deepcopy(model)
    replace_attention(model)
    x = torch.randn(N, L, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), atol=1e-5, rtol=1e-4)
    assert len(calls) == 4


# What stays -------------------------------------------------------------------------------------------------------


def test_everything_is_shared_and_stays_valid() -> None:
    model = Block()
    model.other[0].eval()
    model.first.in_proj_bias.requires_grad_(False)
    seen: list[Any] = []
    handle = model.first.register_forward_hook(lambda module, *_: seen.append(module))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state, modules = list(model.state_dict()), dict(model.named_modules(remove_duplicate=False))
    report = replace_attention(model)

    assert report.replaced == ("first", "second", "other.0")
    assert report.aliases == {"second": "first"}
    assert model.first is model.second
    assert isinstance(model.first, MultiheadAttention)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    assert list(model.state_dict()) == state
    assert [model.first.training, model.other[0].training] == [True, False]
    assert not model.first.in_proj_bias.requires_grad

    before = model.first.in_proj_weight.clone()
    model(torch.randn(N, L, E)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.first.in_proj_weight, before)
    assert seen == [model.first, model.first]
    handle.remove()
    model(torch.randn(N, L, E))
    assert len(seen) == 2


def test_training_step_is_torchs() -> None:
    model = make_encoder(layers=2, activation="gelu").double()
    original = copy.deepcopy(model)
    replace_attention(model)
    x = torch.randn(N, L, E, dtype=torch.float64)
    for m in (model, original):
        m(x, src_key_padding_mask=right_padding()).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-9, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_later_moves(dtype: torch.dtype) -> None:
    model = Block()
    replace_attention(model)
    model.to(dtype)
    assert model(torch.randn(N, L, E, dtype=dtype)).dtype == dtype


def test_parametrized_and_pruned_modules() -> None:
    class Half(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = Block()
    parametrize.register_parametrization(model.first, "in_proj_weight", Half())
    prune.l1_unstructured(model.other[0], "in_proj_weight", amount=0.5)
    x = torch.randn(N, L, E)
    expected = model(x)
    report = replace_attention(model)
    assert report.left == {}
    assert isinstance(model.first, MultiheadAttention)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    copied = copy.deepcopy(model.first)
    assert isinstance(copied, MultiheadAttention)
    torch.testing.assert_close(copied(x, x, x), model.first(x, x, x))
    restore_attention(model)
    assert not isinstance(model.first, MultiheadAttention)
    parametrize.remove_parametrizations(model.first, "in_proj_weight")
    assert type(model.first) is TORCH
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization_after_the_surgery(calls: list[str]) -> None:
    """Quantized linear layers break the fused path's own check in torch; with the path off the encoder runs."""
    model = make_encoder().eval()
    original = copy.deepcopy(model)
    replace_attention(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    x = torch.randn(N, L, E)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), original(x), atol=0.1, rtol=0.1)
    assert len(calls) == 2


def test_compiled_before_the_surgery() -> None:
    """A graph compiled for torch's class is not reused for ours."""
    torch._dynamo.reset()
    model = Block().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(N, L, E)
    before = compiled(x)
    replace_attention(compiled)
    torch.testing.assert_close(compiled(x), before, atol=1e-5, rtol=1e-4)
    assert isinstance(model.first, MultiheadAttention)
    # A causal call without a mask is an error in torch and a causal mask here.
    assert torch.compile(model.first, backend="eager")(x, x, x, is_causal=True)[0].shape == x.shape


# Restoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["itself", "deepcopy", "pickle"])
def test_restore_undoes_everything(through: str) -> None:
    model = torch.nn.Transformer(E, H, 2, 2, 16, dropout=0.0, activation="gelu", batch_first=True).eval()
    untouched = copy.deepcopy(model)
    replace_attention(model)
    replace_attention(model)  # a second time must not forget the first
    if through == "deepcopy":
        model = copy.deepcopy(model)
    elif through == "pickle":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    with torch.no_grad():  # training goes on between
        for parameter, twin in zip(model.parameters(), untouched.parameters(), strict=True):
            parameter.mul_(1.5)
            twin.mul_(1.5)
    restored = restore_attention(model)
    assert len(restored) == 2 + 2 * 2
    for a, b in zip(model.modules(), untouched.modules(), strict=True):
        assert type(a) is type(b)
        assert set(vars(a)) == set(vars(b))
    assert model.encoder.use_nested_tensor is True
    assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == [2, 2]
    x = torch.randn(N, L, E)
    with torch.no_grad():
        assert torch.equal(model(x, x), untouched(x, x))
    assert restore_attention(model) == ()


def test_restore_leaves_modules_that_were_fastattns_own() -> None:
    model = torch.nn.ModuleList([MultiheadAttention(E, H), TORCH(E, H)])
    assert replace_attention(model).replaced == ("1",)
    assert restore_attention(model) == ("1",)
    assert [type(m) for m in model] == [MultiheadAttention, TORCH]


# What is left, and errors -----------------------------------------------------------------------------------------


class Renamed(TORCH):
    """A subclass that changes nothing but its name, and keeps a method of its own."""

    def describe(self) -> str:
        return "renamed"


def test_subclasses_are_left_unless_selected() -> None:
    from torch.ao.nn.quantizable import MultiheadAttention as Quantizable

    model = torch.nn.ModuleDict({"sub": Renamed(E, H), "plain": TORCH(E, H), "quant": Quantizable(E, H)})
    report = replace_attention(model)
    assert report.replaced == ("plain",)
    assert set(report.left) == {"sub", "quant"}
    assert "a subclass of torch.nn.MultiheadAttention" in report.left["sub"]
    assert "torch.ao.nn.quantizable" in report.left["quant"]
    restore_attention(model)

    def choose(path: str, module: torch.nn.Module) -> bool:
        return path == "sub"

    report = replace_attention(model, filter=choose)
    assert report.replaced == ("sub",)
    assert report.left == {"plain": "not selected by filter", "quant": "not selected by filter"}
    assert type(model["sub"]) is MultiheadAttention
    restore_attention(model)
    assert model["sub"].describe() == "renamed"


def _quantizable() -> torch.nn.Module:
    from torch.ao.nn.quantizable import MultiheadAttention as Quantizable

    return Quantizable(E, H)


def _scripted() -> torch.nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        return torch.jit.script(TORCH(E, H))


def _overridden() -> torch.nn.Module:
    module = TORCH(E, H)
    module.forward = lambda *args, **keywords: None
    return module


def _without_weights() -> torch.nn.Module:
    module = TORCH(E, H)
    del module.in_proj_weight
    return module


OBSTACLES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "quantizable": (_quantizable, "linear_Q"),
    "scripted": (_scripted, "TorchScript"),
    "forward overridden": (_overridden, "overridden on the instance"),
    "no weights": (_without_weights, "lacks in_proj_weight"),
}


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_strict_raises_before_anything_changes(obstacle: str, filtered: bool) -> None:
    """Also without a filter, but for the subclass, which nothing selects then."""
    make, reason = OBSTACLES[obstacle]
    model = torch.nn.ModuleDict({"good": TORCH(E, H), "bad": make()})
    select = (lambda path, module: True) if filtered else None
    if obstacle == "quantizable" and not filtered:
        reason = "a subclass"
    else:
        with pytest.raises(ValueError, match=f"cannot replace 1 .*nothing was changed.*bad: .*{reason}"):
            replace_attention(model, filter=select)
        assert type(model["good"]) is TORCH
    report = replace_attention(model, filter=select, strict=False)
    assert report.replaced == ("good",)
    assert reason in report.left["bad"]


def test_a_model_that_is_itself_attention_is_an_error() -> None:
    mha = TORCH(E, H)
    with pytest.raises(ValueError, match=r"assign the module returned by fastattn\.nn\.MultiheadAttention\.from_torch"):
        replace_attention(mha)
    assert type(mha) is TORCH


@pytest.mark.parametrize("keywords", [{"model": "model"}, {"model": torch.nn.Linear(2, 2), "filter": "self_attn"}])
def test_wrong_types(keywords: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"expected a (torch\.nn\.Module|callable)"):
        replace_attention(**keywords)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        restore_attention(torch.zeros(1))


def test_report_reads_well() -> None:
    model = torch.nn.ModuleDict({"encoder": make_encoder(1), "block": Block(), "sub": Renamed(E, H)})
    assert str(replace_attention(model)).splitlines() == [
        "replaced 3 attention modules, left 1",
        "  replaced encoder.layers.0.self_attn",
        "  replaced block.first",
        "  replaced block.second (the same module as block.first)",
        "  replaced block.other.0",
        f"  left     sub: is a {__name__}.Renamed, a subclass of torch.nn.MultiheadAttention that may compute "
        "something else; select it with filter if it does not",
        "  with it  encoder.layers.0",
        "  with it  encoder",
        "  fused inference path off: encoder.layers.0",
    ]
    assert "nothing to replace" in str(replace_attention(torch.nn.Linear(2, 2)))
    layer = make_layer()
    assert "with it  the model itself" in str(report := replace_attention(layer))
    assert "fused inference path off: the model itself" in str(report)


class _Layer(torch.nn.TransformerEncoderLayer):
    pass


class _Encoder(torch.nn.TransformerEncoder):
    pass


@pytest.mark.parametrize("kinds", [(_Layer, torch.nn.TransformerEncoder), (torch.nn.TransformerEncoderLayer, _Encoder)])
def test_subclasses_of_layers_and_encoders_stay_what_they_are(kinds: Any, calls: list[str]) -> None:
    """Their forward may be their own: only the path that bypasses attention is off."""
    layer, encoder = kinds
    model = encoder(layer(E, H, 16, batch_first=True, dropout=0.0), 2).eval()
    original = copy.deepcopy(model)
    report = replace_attention(model)
    assert type(model) is encoder
    assert report.stacks == (() if layer is _Layer else ("layers.0", "layers.1"))
    assert report.fused_paths == ("", "layers.0", "layers.1")
    x = torch.randn(N, L, E)
    with torch.no_grad():
        got, expected = (m(x, src_key_padding_mask=right_padding()) for m in (model, original))
    real = ~right_padding()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-4)
    assert len(calls) == 2
    restore_attention(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_a_layer_with_a_block_of_its_own_keeps_it() -> None:
    model = make_encoder().eval()
    model.layers[0]._ff_block = torch.zeros_like
    x = torch.randn(N, L, E)
    expected = model(x)
    assert replace_attention(model).stacks == ("layers.1",)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_a_layer_put_in_later(calls: list[str]) -> None:
    """A replaced encoder calls it as torch's would: by torch's names, and with nothing else."""

    class Foreign(torch.nn.Module):
        def forward(self, src: Tensor, is_causal: bool, src_key_padding_mask: Any, src_mask: Any = None) -> Tensor:
            assert (is_causal, src_mask) == (False, None)
            return src.masked_fill(src_key_padding_mask[..., None], 0.0)

    model = make_encoder().eval()
    replace_attention(model)
    model.layers[1] = Foreign()
    with torch.no_grad():
        out = model(torch.randn(N, L, E), src_key_padding_mask=right_padding())
    assert out[~right_padding()].all()
    assert len(calls) == 1


def test_a_parametrized_layer_changes_and_comes_back() -> None:
    class Half(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = make_encoder().eval()
    parametrize.register_parametrization(model.layers[0].linear1, "weight", Half())
    model.layers[1].linear3 = torch.nn.Linear(2, 2)
    parametrize.register_parametrization(model.layers[1].linear3, "weight", Half())
    x = torch.randn(N, L, E)
    expected = model(x)
    classes = [type(m) for m in model.modules()]
    assert replace_attention(model).stacks == ("layers.0", "layers.1", "")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    restore_attention(model)
    assert [type(m) for m in model.modules()] == classes
