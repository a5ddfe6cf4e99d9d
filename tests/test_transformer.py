"""The Transformer modules against torch's: results, gradients, state, masks; and positions, grouped heads, sharing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from positions import CASES, HEAD_DIM, HEADS, LENGTH, WIDTH, make
from torch import Tensor

import fastattn
from fastattn import nn as fnn
from fastattn import reference
from fastattn.nn.readout import problem_weights
from fastattn.problem import Problem

N, S, T = 3, 7, 5
FEEDFORWARD = 24
KINDS = ("encoder-layer", "decoder-layer", "encoder", "decoder", "transformer")
MASKS = ("none", "causal-mask", "causal-hint", "bool", "float", "per-head", "padding", "causal-and-padding")


def build(kind: str, library: Any, **options: Any) -> torch.nn.Module:
    """A module of torch.nn or fastattn.nn."""
    stack = {name: options.pop(name) for name in ("position", "share_layers") if name in options}
    if kind == "transformer":
        return library.Transformer(WIDTH, HEADS, 2, 2, FEEDFORWARD, **options, **stack)
    side = "Encoder" if kind.startswith("encoder") else "Decoder"
    if kind.endswith("layer"):
        layer_options = {**options, **{k: v for k, v in stack.items() if k == "position"}}
        return getattr(library, f"Transformer{side}Layer")(WIDTH, HEADS, FEEDFORWARD, **layer_options)
    layer = getattr(library, f"Transformer{side}Layer")(WIDTH, HEADS, FEEDFORWARD, **options)
    norm = torch.nn.LayerNorm(WIDTH, dtype=options.get("dtype"))
    quiet = {"enable_nested_tensor": False} if side == "Encoder" else {}
    return getattr(library, f"Transformer{side}")(layer, 2, norm, **quiet, **stack)


def pair(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A module of torch and one of fastattn with equal parameters, none of them trivial."""
    options = {"dropout": 0.0, "batch_first": True, "dtype": dtype, **options}
    theirs, ours = build(kind, torch.nn, **options), build(kind, fnn, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_inputs(kind: str, layout: str, dtype: torch.dtype) -> list[Tensor]:
    """The source; the target and the source; or the source and the target."""
    source, target = torch.randn(N, S, WIDTH, dtype=dtype), torch.randn(N, T, WIDTH, dtype=dtype)
    tensors = {"encoder": [source], "decoder": [target, source], "transformer": [source, target]}[kind.split("-")[0]]
    if layout == "sequence-first":
        tensors = [x.transpose(0, 1) for x in tensors]
    elif layout == "unbatched":
        tensors = [x[0] for x in tensors]
    return [x.contiguous().requires_grad_() for x in tensors]


def make_masks(kind: str, masks: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of the call, torch's names."""
    batch = 1 if layout == "unbatched" else N
    encoder = kind.startswith("encoder")
    stem = "src" if encoder else "tgt"
    length = S if encoder else T
    self_mask = "mask" if kind == "encoder" else f"{stem}_mask"
    hint = "is_causal" if encoder else "tgt_is_causal"
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)
    padding = (torch.arange(S) >= torch.tensor([S, 4, 2])[:, None])[1 if layout == "unbatched" else slice(None)]
    own_padding = (torch.arange(length) >= torch.tensor([length, 3, 2])[:, None])[
        1 if layout == "unbatched" else slice(None)
    ]
    given: dict[str, Any] = {}
    if masks in ("causal-mask", "causal-hint", "causal-and-padding"):
        given[self_mask] = causal
    if masks == "causal-hint":
        given[hint] = True
    if masks in ("bool", "float", "per-head"):
        shapes = {self_mask: (length, length)} if encoder else {self_mask: (T, T), "memory_mask": (T, S)}
        if kind == "transformer":
            shapes["src_mask"] = (S, S)
        for name, shape in shapes.items():
            hidden = torch.rand(*((batch * HEADS,) if masks == "per-head" else ()), *shape) < 0.3
            hidden[..., 0] = False
            given[name] = (
                hidden if masks == "bool" else torch.randn(hidden.shape, dtype=dtype).masked_fill(hidden, -9e9)
            )
    if masks in ("padding", "causal-and-padding"):
        given[f"{stem}_key_padding_mask"] = own_padding
        if not encoder:
            given["memory_key_padding_mask"] = padding
        if kind == "transformer":
            given["src_key_padding_mask"] = padding
    return given


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.autograd.grad((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum(), leaves))


def check_parity(theirs: torch.nn.Module, ours: torch.nn.Module, inputs: list[Tensor], masks: dict[str, Any]) -> None:
    """Output and all gradients: exact in float64; in float32 within twice torch's own error, and some roundings."""
    dtype = inputs[0].dtype
    expected, got = theirs(*inputs, **masks), ours(*inputs, **masks)
    assert got.dtype == dtype
    found = [got, *gradients(got, [*inputs, *ours.parameters()])]
    stock = [expected, *gradients(expected, [*inputs, *theirs.parameters()])]
    if dtype == torch.float64:
        for x, y in zip(found, stock, strict=True):
            torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
        return
    exact = copy.deepcopy(theirs).double()
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_masks = {
        k: m.double() if isinstance(m, Tensor) and m.is_floating_point() else m for k, m in masks.items()
    }  # fmt: skip
    out = exact(*wide, **wide_masks)
    truth = [out, *gradients(out, [*wide, *exact.parameters()])]
    eps = torch.finfo(dtype).eps
    for x, y, z in zip(found, stock, truth, strict=True):
        # a key's bias shifts all scores of a row alike: its gradient is rounding errors, of the size of the others
        size = max(z.abs().max().item(), 1.0)
        budget = 2 * (y.double() - z).abs().max().item() + 16 * eps * size
        assert (x.double() - z).abs().max().item() <= budget


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_torch(kind: str, norm_first: bool, masks: str) -> None:
    """In train mode; dropout is 0."""
    theirs, ours = pair(kind, norm_first=norm_first)
    check_parity(
        theirs, ours, make_inputs(kind, "batch-first", torch.float64),
        make_masks(kind, masks, "batch-first", torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("masks", ["none", "bool", "causal-and-padding"])
@pytest.mark.parametrize("layout", ["sequence-first", "unbatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str, layout: str, masks: str) -> None:
    theirs, ours = pair(kind, batch_first=layout != "sequence-first")
    check_parity(
        theirs, ours, make_inputs(kind, layout, torch.float64), make_masks(kind, masks, layout, torch.float64)
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"bias": False}, {"layer_norm_eps": 1e-3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_other_options(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(kind, torch.float32, **options)
    check_parity(
        theirs, ours, make_inputs(kind, "batch-first", torch.float32),
        make_masks(kind, "causal-and-padding", "batch-first", torch.float32),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masks", ["none", "causal-mask", "padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_eval_without_gradients(kind: str, masks: str, only_backend: str) -> None:
    """Where torch takes its fused path, ours still runs its own kernel; padded positions may differ there."""
    theirs, ours = (m.eval() for m in pair(kind))
    inputs = make_inputs(kind, "batch-first", torch.float64)
    given = make_masks(kind, masks, "batch-first", torch.float64)
    with torch.no_grad():
        got, expected = ours(*inputs, **given), theirs(*inputs, **given)
    assert fastattn.last_call().backend == only_backend
    padding = given.get("src_key_padding_mask" if kind.startswith("encoder") else "tgt_key_padding_mask")
    real = torch.ones(got.shape[:2], dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(got[real], expected[real], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_state_and_back(kind: str) -> None:
    modules = []
    for library in (torch.nn, fnn):
        torch.manual_seed(3)
        modules.append(build(kind, library, batch_first=True))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, type(theirs))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        inputs = [x.detach() for x in make_inputs(kind, "batch-first", torch.float32)]
        torch.testing.assert_close(copied.eval()(*inputs), ours.eval()(*inputs), rtol=0, atol=0)
        ours.train()


def test_dropout_is_drawn_in_training_only() -> None:
    model = fnn.Transformer(WIDTH, HEADS, 1, 1, FEEDFORWARD, dropout=0.5, batch_first=True)
    inputs = [x.detach() for x in make_inputs("transformer", "batch-first", torch.float32)]
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(*inputs))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.eval()(*inputs), model(*inputs))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_causal_hint_without_a_mask(kind: str) -> None:
    """torch raises; here it is the mask."""
    _, ours = pair(kind)
    inputs = make_inputs(kind, "batch-first", torch.float64)
    given = make_masks(kind, "causal-mask", "batch-first", torch.float64)
    hint = {"is_causal": True} if kind == "encoder" else {"tgt_is_causal": True}
    torch.testing.assert_close(ours(*inputs, **hint), ours(*inputs, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind: str) -> None:
    theirs, ours = pair(kind)
    inputs = make_inputs(kind, "batch-first", torch.float64)
    got = torch.compile(ours, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(got, theirs(*inputs), atol=1e-10, rtol=1e-10)


# Positions and grouped heads ---------------------------------------------------------------------------------------


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, HEAD_DIM)).transpose(1, 2)


def by_hand(module: fnn.MultiheadAttention, x: Tensor, causal: bool, kv_heads: int) -> Tensor:
    """The projections and one call of the reference backend, as a user would write it."""
    rows = (WIDTH, HEAD_DIM * kv_heads, HEAD_DIM * kv_heads)
    q, k, v = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).split(rows, dim=-1)
    q, k, v = split(q, HEADS), split(k, kv_heads), split(v, kv_heads)
    arguments: dict[str, Any] = {"mask": fastattn.Causal() if causal else None, "backend": "reference"}
    position = getattr(module, "position", None)
    run: Any = fastattn.attention
    for part in position if isinstance(position, torch.nn.ModuleList) else [position]:
        if isinstance(part, (fnn.ShawAttention, fnn.CosineAttention)):
            run = part
        elif isinstance(part, fnn.RotaryEmbedding):
            arguments["rotary"] = part(x.shape[1])
        elif isinstance(part, fastattn.Rotary):
            arguments["rotary"] = part
        elif part is not None:
            arguments["bias"] = part() if isinstance(part, torch.nn.Module) else part
    return module.out_proj(run(q, k, v, **arguments).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_position_in_attention(name: str, kv_heads: int) -> None:
    """Output and gradients, those of the encoding's parameters included."""
    if name == "disentangled" and kv_heads != HEADS:
        pytest.skip("its projections are made for as many key heads as query heads")
    module = fnn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, dtype=torch.float64, position=make(name), num_kv_heads=kv_heads
    )  # fmt: skip
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    for causal in (False, True):
        got, _ = module(x, x, x, need_weights=False, is_causal=causal)
        expected = by_hand(module, x, causal, kv_heads)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", [n for n in CASES if n != "disentangled"])
def test_weights_with_a_position(name: str, kv_heads: int) -> None:
    """The weights times the values are the output (without Shaw's vectors beside the values)."""
    module = fnn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, dtype=torch.float64, position=make(name), num_kv_heads=kv_heads
    )  # fmt: skip
    if isinstance(getattr(module, "position", None), fnn.ShawAttention):
        module.position.value_embeddings = None
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    rows = (WIDTH, HEAD_DIM * kv_heads, HEAD_DIM * kv_heads)
    value = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).split(rows, dim=-1)[2]
    value = split(value, kv_heads).repeat_interleave(HEADS // kv_heads, dim=1)
    out, weights = module(x, x, x, is_causal=True, average_attn_weights=False)
    torch.testing.assert_close(module.out_proj((weights @ value).transpose(1, 2).flatten(-2)), out)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights.triu(1).any()
    torch.testing.assert_close(module(x, x, x, is_causal=True)[1], weights.mean(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_of_some_heads_with_tables(groups: int) -> None:
    """Chosen heads keep their own row table, and the column table of their key head."""
    heads, dim, length = 4, 8, 12
    q, k = torch.randn(2, heads, length, dim), torch.randn(2, heads // groups, length, dim)
    tables = {"row_table": torch.randn(2, heads, length, 5), "col_table": torch.randn(2, heads // groups, 5, length)}
    problem = Problem(query=q, key=k, value=k, scale=0.3, columns_left=2, **tables)
    every = problem_weights(problem)
    exact = torch.softmax(0.3 * q @ k.repeat_interleave(groups, 1).mT + reference.bias(problem, torch.float32), dim=-1)
    torch.testing.assert_close(every, exact)
    torch.testing.assert_close(problem_weights(problem, heads=[3, 1]), exact[:, [3, 1]])


def test_grouped_heads_are_repeated_heads() -> None:
    """Against torch's module, whose key and value rows are those of the groups, repeated."""
    ours = fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, num_kv_heads=2)
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    kept = torch.arange(2).repeat_interleave(2)
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = getattr(ours, name).detach().split((WIDTH, 2 * HEAD_DIM, 2 * HEAD_DIM))
        repeated = [x.unflatten(0, (2, HEAD_DIM))[kept].flatten(0, 1) for x in (k, v)]
        getattr(theirs, name).data = torch.cat((q, *repeated))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, y = torch.randn(2, N, 6, WIDTH, dtype=torch.float64)
    for inputs in ((x, x, x), (x, y, y), (x, y, x)):
        for got, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


def test_grouped_heads_with_separate_projections_and_extra_keys() -> None:
    module = fnn.MultiheadAttention(
        WIDTH, HEADS, kdim=6, vdim=10, add_bias_kv=True, add_zero_attn=True, batch_first=True, num_kv_heads=2
    )  # fmt: skip
    assert module.k_proj_weight.shape == (2 * HEAD_DIM, 6)
    assert module.v_proj_weight.shape == (2 * HEAD_DIM, 10)
    out, weights = module(torch.randn(N, 5, WIDTH), torch.randn(N, 7, 6), torch.randn(N, 7, 10))
    assert out.shape == (N, 5, WIDTH)
    assert weights.shape == (N, 5, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_reaches_self_attention_only(kind: str) -> None:
    """A model with rotary embedding sees the order of its inputs, and its memory still has none."""
    ours = build(kind, fnn, batch_first=True, dtype=torch.float64, position=fnn.RotaryEmbedding(HEAD_DIM)).eval()
    plain = build(kind, torch.nn, batch_first=True, dtype=torch.float64).eval()
    plain.load_state_dict(ours.state_dict())
    inputs = [x.detach() for x in make_inputs(kind, "batch-first", torch.float64)]
    flipped = [x.flip(1) for x in inputs]
    torch.testing.assert_close(plain(*flipped), plain(*inputs).flip(1))
    assert not torch.allclose(ours(*flipped), ours(*inputs).flip(1))
    if kind.startswith("decoder"):
        torch.testing.assert_close(ours(inputs[0], flipped[1]), ours(*inputs))


def test_one_encoding_per_stack_or_per_layer() -> None:
    shared = fnn.Transformer(WIDTH, HEADS, 3, 2, FEEDFORWARD, position=fnn.T5Bias(HEADS, 8, 20))
    assert [k for k in shared.state_dict() if "position" in k] == ["encoder.position.weight", "decoder.position.weight"]
    assert shared.encoder.position.weight is not shared.decoder.position.weight
    sides = fnn.Transformer(
        WIDTH, HEADS, 1, 1, FEEDFORWARD, position=(fnn.T5Bias(HEADS), lambda: fnn.T5Bias(HEADS, bidirectional=False))
    )  # fmt: skip
    assert (sides.encoder.position.bidirectional, sides.decoder.position.bidirectional) == (True, False)
    layer = fnn.TransformerEncoderLayer(WIDTH, HEADS, position=lambda: fnn.T5Bias(HEADS))
    own = fnn.TransformerEncoder(layer, 2)
    assert len([k for k in own.state_dict() if "position" in k]) == 2
    source, target = torch.randn(4, N, WIDTH), torch.randn(5, N, WIDTH)
    shared(source, target).sum().backward()
    assert all(p.grad is not None for p in shared.parameters())


# Sharing -----------------------------------------------------------------------------------------------------------

GROUPS = {"albert": (4, 1, (0, 0, 0, 0)), "two": (4, 2, (0, 0, 1, 1)), "uneven": (5, 2, (0, 0, 0, 1, 1))}
GROUPS |= {"cycle": (4, (0, 1, 0, 1), (0, 1, 0, 1)), "none": (3, None, (0, 1, 2))}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("side", ["Encoder", "Decoder"])
def test_shared_layers(side: str, name: str) -> None:
    """One entry per tensor, and gradients that are the sums over the uses, as in an unshared twin of torch."""
    count, share, groups = GROUPS[name]
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    ours = getattr(fnn, f"Transformer{side}")(
        getattr(fnn, f"Transformer{side}Layer")(WIDTH, HEADS, FEEDFORWARD, **options), count, share_layers=share
    )
    assert ours.layer_groups == groups
    assert len(ours.layers) == max(groups) + 1
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = ours.state_dict()
    assert len({x.data_ptr() for x in state.values()}) == len(state) == len(list(ours.parameters()))
    theirs = getattr(torch.nn, f"Transformer{side}")(
        getattr(torch.nn, f"Transformer{side}Layer")(WIDTH, HEADS, FEEDFORWARD, **options), count,
        **({"enable_nested_tensor": False} if side == "Encoder" else {}),
    )  # fmt: skip
    for place, group in enumerate(groups):
        theirs.layers[place].load_state_dict(ours.layers[group].state_dict())
    inputs = [x.detach() for x in make_inputs(side.lower(), "batch-first", torch.float64)]
    got, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for group, layer in enumerate(ours.layers):
        uses = [theirs.layers[place] for place in range(count) if groups[place] == group]
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, sum(use.get_parameter(key).grad for use in uses))
    again = copy.deepcopy(ours)
    again.load_state_dict(state)
    assert len(list(again.parameters())) == len(state)


def test_sharing_in_a_transformer() -> None:
    model = fnn.Transformer(WIDTH, HEADS, 4, 2, FEEDFORWARD, share_layers=(1, None))
    assert (model.encoder.layer_groups, model.decoder.layer_groups) == ((0, 0, 0, 0), (0, 1))
    model = fnn.Transformer(WIDTH, HEADS, 2, 2, FEEDFORWARD, share_layers=(0, 1))
    assert (model.encoder.layer_groups, model.decoder.layer_groups) == ((0, 1), (0, 1))
    model = fnn.Transformer(WIDTH, HEADS, 2, 2, FEEDFORWARD, share_layers=1)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (1, 1)


class LanguageModel(torch.nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, WIDTH)
        self.output = fnn.TiedLinear(self.embedding, bias=True) if tied else torch.nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.embedding(ids))


def test_tied_output() -> None:
    tied, twin = LanguageModel(True), LanguageModel(False)
    assert list(tied.state_dict()) == ["embedding.weight", "output.bias"]
    assert len(list(tied.parameters())) == 2
    for layer in (twin.embedding, twin.output):
        layer.weight.data = tied.embedding.weight.data.clone()
    twin.output.bias.data.zero_()
    ids = torch.randint(11, (2, 5))
    out, expected = tied(ids), twin(ids)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(tied.embedding.weight.grad, twin.embedding.weight.grad + twin.output.weight.grad)
    copied = copy.deepcopy(tied)
    assert copied.output.weight is copied.embedding.weight
    state = {name: x + 1 for name, x in tied.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    assert copied.output.weight is copied.embedding.weight
    assert torch.equal(copied.output.weight, state["embedding.weight"])
    assert tied.double().output.weight.dtype == torch.float64


class SharedByHand(torch.nn.Module):
    """A torch model that uses one layer three times, and one attention in two layers."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
        layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, **options)
        other = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, **options)
        other.self_attn = layer.self_attn
        self.layers = torch.nn.ModuleList([layer, layer, other, layer])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_replace_attention_keeps_sharing() -> None:
    model = SharedByHand()
    stock = copy.deepcopy(model)
    names, count = list(model.state_dict()), len(list(model.parameters()))
    report = fastattn.replace_attention(model)
    assert len(report.replaced) - len(report.aliases) == 1
    assert model.layers[0] is model.layers[1] is model.layers[3]
    assert model.layers[0].self_attn is model.layers[2].self_attn
    assert isinstance(model.layers[0].self_attn, fnn.MultiheadAttention)
    assert list(model.state_dict()) == names
    assert len(list(model.parameters())) == count
    x = torch.randn(N, S, WIDTH, dtype=torch.float64)
    got, expected = model(x), stock(x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        gradients(got, list(model.parameters())), gradients(expected, list(stock.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b)


# Bad input ---------------------------------------------------------------------------------------------------------


def _layer(**options: Any) -> fnn.TransformerEncoderLayer:
    return fnn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, **options)


def _attention(**options: Any) -> fnn.MultiheadAttention:
    return fnn.MultiheadAttention(WIDTH, HEADS, **options)


X = torch.zeros(2, 3, WIDTH)
STOCK = torch.nn.TransformerEncoderLayer(WIDTH, HEADS)
ROWS: list[tuple[str, Any, type[Exception], str]] = [
    ("position a string", lambda: _attention(position="rotary"), TypeError, "position: expected an encoding.*str"),
    ("absolute", lambda: _attention(position=fnn.SinusoidalEmbedding(WIDTH)), TypeError, "added to the embeddings"),
    ("head dim", lambda: _layer(position=fnn.RotaryEmbedding(16)), ValueError, "head_dim = 8, got int 16"),
    ("objects in a list", lambda: _attention(position=[fastattn.Sandwich(4)]), TypeError, "modules of fastattn.nn"),
    (
        "position and bias key", lambda: _attention(position=fnn.ALiBi(HEADS), add_bias_kv=True),
        ValueError, "add_bias_kv",
    ),
    ("kv heads 3", lambda: _attention(num_kv_heads=3), ValueError, "num_kv_heads: expected a divisor.*3"),
    ("kv heads 0", lambda: _layer(num_kv_heads=0), ValueError, "num_kv_heads"),
    ("kv heads a float", lambda: _layer(num_kv_heads=2.0), TypeError, "num_kv_heads"),
    ("heads of the bias", lambda: _attention(position=fnn.ALiBi(3))(X, X, X), ValueError, "ALiBi.slopes"),
    ("no bias", lambda: _attention(position=torch.nn.Identity)(X, X, X), TypeError, "forward"),
    ("gives a tensor", lambda: _attention(position=_Gives)(X, X, X), TypeError, "gives a fastattn Bias"),
    (
        "two rotations", lambda: _attention(position=[fnn.RotaryEmbedding(8), fnn.RotaryEmbedding(8)])(X, X, X),
        ValueError, "at most one rotation",
    ),
    (
        "shaw and rotary", lambda: _attention(position=[fnn.RotaryEmbedding(8), fnn.ShawAttention(8, 2)])(X, X, X),
        ValueError, "ShawAttention without a rotation",
    ),
    (
        "shaw and cosine", lambda: _attention(position=[fnn.CosineAttention(4), fnn.ShawAttention(8, 2)])(X, X, X),
        ValueError, "at most one of ShawAttention",
    ),
    (
        "own and the call's", lambda: _attention(position=fnn.ALiBi(HEADS))(X, X, X, position=fnn.ALiBi(HEADS)),
        ValueError, "position: expected None",
    ),
    (
        "layer's and stack's",
        lambda: fnn.TransformerEncoder(_layer(position=fnn.ALiBi(HEADS)), 2, position=fnn.ALiBi(HEADS)),
        ValueError, "position: expected None",
    ),
    ("stock layer", lambda: fnn.TransformerEncoder(STOCK, 2), TypeError, "encoder_layer: expected a fastattn.nn"),
    ("wrong layer", lambda: fnn.TransformerDecoder(_layer(), 2), TypeError, "decoder_layer"),
    ("too many groups", lambda: fnn.TransformerEncoder(_layer(), 2, share_layers=3), ValueError, "share_layers.*3"),
    ("no groups", lambda: fnn.TransformerEncoder(_layer(), 2, share_layers=0), ValueError, "share_layers"),
    ("short map", lambda: fnn.TransformerEncoder(_layer(), 3, share_layers=(0, 1)), ValueError, "each of 3"),
    ("map with a gap", lambda: fnn.TransformerEncoder(_layer(), 2, share_layers=(0, 2)), ValueError, "without gaps"),
    ("map a float", lambda: fnn.TransformerEncoder(_layer(), 2, share_layers=1.0), TypeError, "share_layers"),
    (
        "custom stack and sharing",
        lambda: fnn.Transformer(WIDTH, HEADS, custom_encoder=torch.nn.Identity(), share_layers=1),
        ValueError, "share_layers: expected None with a custom_encoder",
    ),
    ("tie to a linear", lambda: fnn.TiedLinear(torch.nn.Linear(2, 2)), TypeError, "embedding"),
    ("int mask", lambda: _layer()(X, src_key_padding_mask=torch.zeros(3, 2).int()), AssertionError, "bool"),
    ("mask shape", lambda: _layer()(X, torch.zeros(3, 3)), RuntimeError, "2D attn_mask"),
    (
        "nested", lambda: _attention(num_kv_heads=1)(*[torch.nested.nested_tensor([X[0], X[1, :2]])] * 3),
        NotImplementedError, "plain dense tensors",
    ),
]  # fmt: skip


class _Gives(torch.nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("call", "error", "match"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


class _Holder(torch.nn.Module):
    """A user's model, which a symbolic trace looks into as far as torch's modules."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        name = "src" if "Encoder" in type(self.module).__name__ else "tgt"
        memory = () if name == "src" else (x,)
        return self.module(x, *memory, **{f"{name}_key_padding_mask": padding})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "transformer"])
def test_symbolic_traces_keep_layers_and_stacks_whole(kind: str) -> None:
    model = _Holder(pair(kind)[1]).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["module"]
    x, padding = torch.randn(N, S, WIDTH, dtype=torch.float64), torch.arange(S) >= torch.tensor([S, 4, 2])[:, None]
    torch.testing.assert_close(traced(x, padding), model(x, padding))
