"""Encoders that leave padding out: the same tokens, in fewer rows, wherever nothing else can tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from positions import CASES, HEADS, LENGTH, WIDTH, make
from torch import Tensor

import fastattn
from fastattn import nn as fnn

N = 4
LENGTHS = (LENGTH, 5, 1, 9)
TOKENS = sum(LENGTHS)
RIGHT = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None]
HOLES = torch.stack(
    [row[torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i))] for i, row in enumerate(RIGHT)]
)
PADDINGS = {"right": RIGHT, "left": RIGHT.flip(1), "holes": HOLES}
BY_TABLE = {name for name in CASES if name.startswith(("none", "rotary", "cosine"))} - {"rotary-and-alibi"}
BY_DISTANCE = {name for name in CASES if name.startswith(("t5", "alibi", "shaw", "kerple", "clipped"))} | {
    "rotary-and-alibi"
}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The query length of every attention call."""
    seen: list[int] = []
    run = fastattn.dispatch.run

    def noting(problem: Any, *rest: Any, **named: Any) -> Any:
        seen.append(problem.query_length)
        return run(problem, *rest, **named)

    monkeypatch.setattr(fastattn.dispatch, "run", noting)
    monkeypatch.setattr(fastattn.dispatch, "run_shortcut", lambda *_: None)  # every call is a problem
    return seen


def make_encoder(*, layers: int = 2, position: object = None, skip_padding: bool | None = None, **options: Any) -> Any:
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, **options}
    layer = fnn.TransformerEncoderLayer(WIDTH, HEADS, 24, **options)
    norm = torch.nn.LayerNorm(WIDTH, dtype=options["dtype"])
    encoder = fnn.TransformerEncoder(layer, layers, norm, position=position, skip_padding=skip_padding)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def make_batch(batch_first: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*((N, LENGTH) if batch_first else (LENGTH, N)), WIDTH, dtype=dtype)


def outcome(encoder: Any, x: Tensor, padding: Tensor, **call: Any) -> list[Tensor]:
    """The output at real positions, and the gradients of all that takes part, of a loss that looks at nothing else."""
    x = x.clone().requires_grad_()
    real = ~padding if x.shape[0] == N else ~padding.t()
    out = encoder(x, src_key_padding_mask=padding, **call)[real]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *encoder.parameters()], allow_unused=True)]


@pytest.fixture(params=["documents", "batch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What attention sees: documents, as on a CPU, or the batch put together again."""
    monkeypatch.setattr(fnn.padding, "_passes_over_documents", lambda device: request.param == "documents")
    return request.param


def check_same(encoder: Any, x: Tensor, padding: Tensor, **call: Any) -> None:
    """With padding left out and computed."""
    encoder.skip_padding = False
    computed = outcome(encoder, x, padding, **call)
    encoder.skip_padding = True
    for got, expected in zip(outcome(encoder, x, padding, **call), computed, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "sequence-first"])
def test_training_without_padding(
    batch_first: bool, norm_first: bool, padding: str, causal: bool, form: str, lengths: list[int]
) -> None:
    encoder = make_encoder(batch_first=batch_first, norm_first=norm_first, activation="gelu" if causal else "relu")
    rows: list[int] = []
    with encoder.layers[1].linear1.register_forward_hook(lambda module, inputs, out: rows.append(out[..., 0].numel())):
        check_same(encoder, make_batch(batch_first), PADDINGS[padding], is_causal=causal)
    assert lengths == [LENGTH] * 2 + [TOKENS if form == "documents" else LENGTH] * 2
    assert rows == [N * LENGTH, TOKENS]
    out = encoder.layers[0](make_batch(batch_first))  # without a batch's padding a layer is what it was
    assert out.shape == make_batch(batch_first).shape
    encoder.norm = None
    hidden = PADDINGS[padding] if batch_first else PADDINGS[padding].t()
    assert not encoder(make_batch(batch_first), src_key_padding_mask=PADDINGS[padding], is_causal=causal)[hidden].any()


@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("owner", ["stack", "layer"])
@pytest.mark.parametrize("name", CASES)
def test_encodings(name: str, owner: str, padding: str, form: str, lengths: list[int]) -> None:
    """A table's rows and distances go along, these unless there are holes; else the padding is computed."""
    if owner == "stack":
        encoder = make_encoder(position=make(name))
    else:
        encoder = make_encoder(layers=1)
        if name != "none":
            encoder.layers[0].self_attn.position = fnn.position.make_position(make(name))
    encoder = encoder.double()
    check_same(encoder, make_batch(), PADDINGS[padding])
    calls = len(lengths) // 2
    left_out = name in BY_TABLE or (name in BY_DISTANCE and padding != "holes")
    assert lengths[calls:] == [TOKENS if left_out and form == "documents" else LENGTH] * calls


def test_tables_of_each_sequence(form: str) -> None:
    """Every token finds the row of its own sequence and position, as without packing."""
    angles = torch.rand(N, LENGTH, WIDTH // HEADS // 2, dtype=torch.float64)
    encoder = make_encoder(position=fastattn.Rotary(angles.cos(), angles.sin()))
    check_same(encoder, make_batch(), HOLES)


@pytest.mark.parametrize("float_mask", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("replaced", [False, True], ids=["built", "replaced"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inference_leaves_out_what_torch_does(replaced: bool, float_mask: bool, lengths: list[int]) -> None:
    """In every row, padded ones too: 0 where torch makes nested tensors, computed where not."""
    for options in ({}, {"norm_first": True}, {"batch_first": False}, {"activation": torch.tanh}, {"bias": False}):
        built = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64, **options}
        stock = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, **built)
        theirs = torch.nn.TransformerEncoder(stock, 2, enable_nested_tensor=not options).eval()
        if replaced:
            ours = copy.deepcopy(theirs)
            fastattn.replace_attention(ours)
        else:
            ours = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(WIDTH, HEADS, 24, **built), 2).eval()
            ours.load_state_dict(theirs.state_dict())
        x = make_batch(built["batch_first"])
        for name, padding in PADDINGS.items():
            given = torch.zeros(N, LENGTH, dtype=x.dtype).masked_fill(padding, float("-inf")) if float_mask else padding
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    got, expected = (m(x, src_key_padding_mask=given) for m in (ours, theirs))
                torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
                left_out = name == "right" and not grad and not options
                assert lengths[-2:] == [TOKENS if left_out else LENGTH] * 2
                assert got[padding if built["batch_first"] else padding.t()].any().item() is not left_out


def test_switches_of_inference(lengths: list[int]) -> None:
    """torch's own, ours, and whatever would see the shape."""
    encoder, x = make_encoder().eval(), make_batch()

    def ran(encoder: Any, padding: Tensor = RIGHT, mask: Tensor | None = None) -> bool:
        """Whether the padding was left out."""
        with torch.no_grad():
            encoder(x, mask, src_key_padding_mask=padding)
        return lengths[-1] != LENGTH

    assert ran(encoder)
    for name, value in (("skip_padding", False), ("use_nested_tensor", False)):
        other = copy.deepcopy(encoder)
        setattr(other, name, value)
        assert not ran(other)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert not ran(encoder)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.set_autocast_enabled("cuda", True)  # what torch asks for, whatever the device
    try:
        assert not ran(encoder)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert not ran(encoder, PADDINGS["left"])
    unchecked = copy.deepcopy(encoder)
    unchecked.mask_check = False
    assert ran(unchecked, PADDINGS["left"])
    assert not ran(encoder, torch.zeros_like(RIGHT))
    assert not ran(encoder, torch.ones_like(RIGHT))
    assert not ran(encoder, mask=torch.zeros(LENGTH, LENGTH, dtype=torch.bool))
    assert not ran(encoder, torch.randn(N, LENGTH, dtype=x.dtype))
    for module in (encoder.layers[1], encoder.layers[0].linear1):
        with module.register_forward_hook(lambda *_: None):
            assert not ran(encoder)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not ran(encoder)
    with fastattn.inspect(encoder) as record:
        assert not ran(encoder)
    assert record[0].weights.shape == (N, HEADS, LENGTH, LENGTH)
    assert ran(encoder)
    assert not ran(encoder.train())


class _Odd(fnn.TransformerEncoderLayer):
    """A layer that looks at a token's neighbours."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x.roll(1, 1))


def _with_odd_layer(encoder: Any) -> None:
    encoder.layers[1].__class__ = _Odd


def _with_batch_norm(encoder: Any) -> None:
    encoder.layers[1].norm1 = torch.nn.Identity()


def _with_zero_key(encoder: Any) -> None:
    encoder.layers[0].self_attn.add_zero_attn = True


@pytest.mark.parametrize("change", [_with_odd_layer, _with_batch_norm, _with_zero_key])
def test_padding_that_has_to_be_computed(change: Any, lengths: list[int]) -> None:
    """Even when asked to leave it out."""
    encoder = make_encoder(skip_padding=True)
    change(encoder)
    encoder(make_batch(), src_key_padding_mask=RIGHT)
    assert lengths == [LENGTH] * 2


def test_under_transforms_and_in_graphs(lengths: list[int]) -> None:
    encoder, x = make_encoder(skip_padding=True).eval(), make_batch()
    expected = encoder(x, src_key_padding_mask=RIGHT)[~RIGHT]
    assert lengths == [TOKENS] * 2
    many = torch.vmap(lambda y: encoder(y, src_key_padding_mask=RIGHT))(x[None])
    torch.testing.assert_close(many[0][~RIGHT], expected)
    gradient = torch.func.grad(lambda y: encoder(y, src_key_padding_mask=RIGHT)[~RIGHT].sum())(x)
    assert not gradient[RIGHT].any()
    assert gradient[~RIGHT].any()
    assert TOKENS not in lengths[2:]
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)(x, src_key_padding_mask=RIGHT)
    torch.testing.assert_close(compiled[~RIGHT], expected)


def test_dropout_and_a_replaced_encoder_in_training(lengths: list[int]) -> None:
    """The attribute is the switch of an encoder that torch made."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, dropout=0.5)
    encoder = torch.nn.TransformerEncoder(layer, 2)
    fastattn.replace_attention(encoder)
    x = make_batch(dtype=torch.float32)
    encoder(x, src_key_padding_mask=RIGHT)
    encoder.skip_padding = True
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(encoder(x, src_key_padding_mask=RIGHT))
    assert lengths == [LENGTH] * 2 + [TOKENS] * 6
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_autocast(lengths: list[int]) -> None:
    encoder, x = make_encoder(dtype=torch.float32, skip_padding=True), make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(x, src_key_padding_mask=RIGHT)
        encoder.skip_padding = False
        expected = encoder(x, src_key_padding_mask=RIGHT)
    assert lengths == [TOKENS] * 2 + [LENGTH] * 2
    assert got.dtype == expected.dtype
    exact = copy.deepcopy(encoder).double()(x.double(), src_key_padding_mask=RIGHT)
    own = (expected.double() - exact)[~RIGHT].abs().max()
    assert (got.double() - exact)[~RIGHT].abs().max() <= 2 * own


def test_hooks_see_what_linear_layers_give() -> None:
    """An activation works in place only on what nobody else has."""
    encoder, x = make_encoder(layers=1).eval(), make_batch()
    seen: dict[str, Tensor] = {}
    linear = encoder.layers[0].linear1
    with torch.no_grad():
        expected = encoder(x)
        with linear.register_forward_hook(lambda module, inputs, out: seen.update(out=out)):
            assert torch.equal(encoder(x), expected)
        assert seen["out"].min() < 0
        linear.forward = lambda x: seen.update(out=type(linear).forward(linear, x)) or seen["out"]
        assert torch.equal(encoder(x), expected)
        del linear.forward
        assert seen["out"].min() < 0
        with torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, out: seen.update(out=out) if module is linear else None
        ):
            encoder(x)
        assert seen["out"].min() < 0
    with linear.register_full_backward_hook(lambda module, given, got: seen.update(gradient=got[0])):
        out = encoder(x)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
    assert seen["gradient"].shape == seen["out"].shape


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="skip_padding: expected a bool or None, got str 'yes'"):
        make_encoder(skip_padding="yes")  # type: ignore[arg-type]
