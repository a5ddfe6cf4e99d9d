"""fastattn.nn.MultiheadAttention against torch.nn.MultiheadAttention: results, gradients, state, errors, masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import MultiheadAttention

# torch's own complaint about a bool mask beside a float one.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

N, L, S, E, H = 3, 5, 7, 8, 2
TORCH = torch.nn.MultiheadAttention
NEG_INF = float("-inf")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "kdim-vdim": {"kdim": 6, "vdim": 10},
    "kdim-no-bias": {"kdim": 6, "bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "bias-kv-zero-attn-vdim": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 4},
}
LAYOUTS = ("batch-first", "sequence-first", "unbatched")
ATTN_MASKS = ("none", "bool-2d", "bool-3d", "float-2d", "float-3d")
PADDING = ("none", "bool", "float", "learned", "float-of-bool")
WEIGHTS = {
    "output": {"need_weights": False},
    "averaged": {"need_weights": True, "average_attn_weights": True},
    "per-head": {"need_weights": True, "average_attn_weights": False},
}


def make_inputs(layout: str, kdim: int = E, vdim: int = E, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(N, L, E), (N, S, kdim), (N, S, vdim)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if layout == "sequence-first":
        tensors = [x.transpose(0, 1).contiguous() for x in tensors]
    elif layout == "unbatched":
        tensors = [x[0] for x in tensors]
    return [x.requires_grad_() for x in tensors]


def make_attn_mask(kind: str, layout: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Masks that leave at least one key to every query."""
    if kind == "none":
        return None
    batch = 1 if layout == "unbatched" else N
    shape = (L, S) if kind.endswith("2d") else (batch * H, L, S)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind.startswith("bool"):
        return hidden
    return torch.randn(shape, dtype=dtype).masked_fill(hidden, NEG_INF).requires_grad_()


def make_padding(kind: str, layout: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
    if kind == "none":
        return None
    hidden = torch.arange(S) >= torch.tensor([S, 4, 1])[:, None]
    if kind in ("float", "learned"):
        mask = torch.randn(N, S, dtype=dtype).masked_fill(hidden, NEG_INF).requires_grad_(kind == "learned")
    elif kind == "float-of-bool":
        mask = torch.zeros(N, S, dtype=dtype).masked_fill(hidden, NEG_INF)
    else:
        mask = hidden
    return mask.detach()[1].requires_grad_(mask.requires_grad) if layout == "unbatched" else mask


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    """A torch module and a fastattn module with equal parameters, none of them trivial."""
    theirs = TORCH(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    ours = MultiheadAttention(E, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def gradients(outputs: tuple[Tensor, Tensor | None], leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed random functional of output and weights."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros(())
    for x in outputs:
        if x is not None:
            loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def assert_same(ours: Tensor | None, theirs: Tensor | None, tolerance: float = 1e-10) -> None:
    if ours is None or theirs is None:
        assert ours is theirs
        return
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_torch(options: str, layout: str, attn_mask: str, padding: str) -> None:
    """Output, weights, and the gradients of inputs, parameters and float masks."""
    theirs, ours = pair(**OPTIONS[options], batch_first=layout == "batch-first")
    inputs = make_inputs(layout, theirs.kdim, theirs.vdim)
    masks = {"attn_mask": make_attn_mask(attn_mask, layout), "key_padding_mask": make_padding(padding, layout)}
    leaves = inputs + [mask for mask in masks.values() if mask is not None and mask.requires_grad]
    for weights in WEIGHTS.values():
        expected, got = theirs(*inputs, **masks, **weights), ours(*inputs, **masks, **weights)
        for x, y in zip(got, expected, strict=True):
            assert_same(x, y)
        expected_grads = gradients(expected, leaves + list(theirs.parameters()))
        for x, y in zip(gradients(got, leaves + list(ours.parameters())), expected_grads, strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("same", ["all", "key-value", "query-key", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_inputs(layout: str, same: str) -> None:
    """Self-attention and attention over a memory take packed products; the results must not depend on that."""
    theirs, ours = pair(batch_first=layout == "batch-first")
    x, y = make_inputs(layout)[1:]
    args = {"all": (x, x, x), "key-value": (x, y, y), "query-key": (x, x, y), "none": (x, y, x)}[same]
    expected, got = theirs(*args), ours(*args)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    leaves = [leaf for leaf in (x, y) if any(leaf is arg for arg in args)]
    for a, b in zip(
        gradients(got, leaves + list(ours.parameters())),
        gradients(expected, leaves + list(theirs.parameters())),
        strict=True,
    ):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["plain", "bias-kv"])
def test_dtypes(options: str, dtype: torch.dtype) -> None:
    """Within twice torch's own error against float64, with a float32 mask where torch takes one."""
    theirs, ours = pair(dtype=dtype, batch_first=True, **OPTIONS[options])
    exact = copy.deepcopy(theirs).double()
    inputs = [x.detach().to(dtype) for x in make_inputs("batch-first")]
    mask = make_attn_mask("float-2d", "batch-first").detach().to(dtype)
    reference = exact(*[x.double() for x in inputs], attn_mask=mask.double())
    expected, got = theirs(*inputs, attn_mask=mask), ours(*inputs, attn_mask=mask)
    for x, y, r in zip(got, expected, reference, strict=True):
        assert x.dtype == y.dtype == dtype
        error, budget = (x.double() - r).abs().max(), 2 * (y.double() - r).abs().max() + torch.finfo(dtype).eps
        assert error <= budget
    for weights in WEIGHTS.values():  # a kernel of its own for each, which round differently
        half_with_float_mask = ours(*inputs, attn_mask=mask.float(), **weights)[0]
        torch.testing.assert_close(half_with_float_mask, ours(*inputs, attn_mask=mask, **weights)[0])


@pytest.mark.parametrize("attn_mask", ["none", "bool-2d", "bool-3d"])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_matches_torch_inference_fast_path(attn_mask: str, padding: str, weights: str) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64)
    mask = None
    if attn_mask != "none":
        mask = torch.rand((S, S) if attn_mask == "bool-2d" else (N * H, S, S)) < 0.4
        mask[..., 0] = False
    padded = make_padding(padding, "batch-first")
    with torch.no_grad():
        expected = theirs.eval()(x, x, x, attn_mask=mask, key_padding_mask=padded, **WEIGHTS[weights])
        got = ours.eval()(x, x, x, attn_mask=mask, key_padding_mask=padded, **WEIGHTS[weights])
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", ["plain", "zero-attn", "bias-kv"])
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes(sizes: tuple[int, int, int], options: str, weights: str) -> None:
    batch, queries, keys = sizes
    theirs, ours = pair(batch_first=True, **OPTIONS[options])
    q, k = torch.randn(batch, queries, E, dtype=torch.float64), torch.randn(batch, keys, E, dtype=torch.float64)
    expected, got = theirs(q, k, k, **WEIGHTS[weights]), ours(q, k, k, **WEIGHTS[weights])
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    if keys == 0 and options == "plain":
        torch.testing.assert_close(got[0], theirs.out_proj.bias.expand_as(got[0]))
    grads = gradients(got, list(ours.parameters()))
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_contiguous(layout: str) -> None:
    _, ours = pair(batch_first=layout == "batch-first")
    inputs = make_inputs(layout)
    assert ours(*inputs)[0].is_contiguous()
    assert ours(inputs[1], inputs[1], inputs[1])[0].is_contiguous()


# Masks ------------------------------------------------------------------------------------------------------------


def causal_mask(rows: int, cols: int) -> Tensor:
    return torch.ones(rows, cols, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_causal_without_a_mask_is_a_causal_mask(layout: str, options: str, padding: str) -> None:
    """Query i sees keys j <= i (top left), for L != S too, and the added keys; torch has no such call."""
    theirs, ours = pair(batch_first=layout == "batch-first", **OPTIONS[options])
    inputs = make_inputs(layout, theirs.kdim, theirs.vdim)
    padded = make_padding(padding, layout)
    mask = causal_mask(L, S)
    explicit = mask if padded is None or padded.dtype == torch.bool else torch.zeros(L, S).masked_fill(mask, NEG_INF)
    for weights in WEIGHTS.values():
        expected = theirs(*inputs, attn_mask=explicit, key_padding_mask=padded, **weights)
        got = ours(*inputs, key_padding_mask=padded, is_causal=True, **weights)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
        for a, b in zip(
            gradients(got, list(ours.parameters())), gradients(expected, list(theirs.parameters())), strict=True
        ):
            assert_same(a, b)


@pytest.mark.parametrize("hint", ["right", "wrong"])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_is_causal_with_a_mask_is_torchs_hint(weights: str, padding: str, hint: str) -> None:
    theirs, ours = pair(batch_first=True)
    inputs = make_inputs("batch-first")
    mask = causal_mask(L, S) if hint == "right" else make_attn_mask("bool-2d", "batch-first")
    masks = {"attn_mask": mask, "key_padding_mask": make_padding(padding, "batch-first")}
    expected = theirs(*inputs, **masks, is_causal=True, **WEIGHTS[weights])
    got = ours(*inputs, **masks, is_causal=True, **WEIGHTS[weights])
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("options", ["bias-kv", "zero-attn"])
def test_is_causal_with_a_mask_does_not_hide_added_keys(options: str) -> None:
    """torch's hint hides them when no weights are asked for, and its mask does not; here both agree."""
    theirs, ours = pair(batch_first=True, **OPTIONS[options])
    inputs = make_inputs("batch-first")
    mask = causal_mask(L, S)
    expected = theirs(*inputs, attn_mask=mask)[0]
    assert_same(ours(*inputs, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)
    assert not torch.allclose(theirs(*inputs, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)


@pytest.mark.parametrize("kind", ["bool-attn", "float-attn", "padding", "float-padding", "split"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_wholly_masked_rows_attend_to_nothing(kind: str, weights: str) -> None:
    """Attention 0, weights 0, no gradient; the other rows are as if nothing had happened."""
    theirs, ours = pair(batch_first=True)
    inputs = make_inputs("batch-first")
    dead = torch.zeros(N, L, dtype=torch.bool)
    attn, padding = torch.zeros(L, S, dtype=torch.bool), torch.zeros(N, S, dtype=torch.bool)
    if kind == "split":  # only both masks together hide everything
        attn[2, :4] = True
        padding[1, 4:] = True
        dead[1, 2] = True
    elif "attn" in kind:
        attn[2] = True
        dead[:, 2] = True
    else:
        padding[1] = True
        dead[1] = True
    masks: dict[str, Tensor] = {"attn_mask": attn, "key_padding_mask": padding}
    if kind.startswith("float"):
        masks = {name: torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, NEG_INF) for name, m in masks.items()}
    out, attention = ours(*inputs, **masks, **WEIGHTS[weights])
    torch.testing.assert_close(out[dead], ours.out_proj.bias.expand(int(dead.sum()), E))
    # torch on masks that leave these rows one key: every other row must agree.
    alive = {name: m.clone() for name, m in masks.items()}
    alive["attn_mask"][..., 0] = 0
    alive["key_padding_mask"][..., 0] = 0
    other = ~dead & ~(masks["attn_mask"] != alive["attn_mask"]).any(-1)
    other = other & ~(masks["key_padding_mask"] != alive["key_padding_mask"]).any(-1)[:, None]
    expected = theirs(*inputs, **alive, **WEIGHTS[weights])
    assert_same(out[other], expected[0][other])
    if attention is not None:
        per_row = attention if attention.dim() == 3 else attention.transpose(1, 2)
        assert (per_row[dead] == 0).all()
        torch.testing.assert_close(per_row[~dead].sum(-1), torch.ones(per_row[~dead].shape[:-1], dtype=torch.float64))
    grads = gradients((out, attention), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][dead] == 0).all()


def test_finfo_min_is_a_number() -> None:
    """A row of it is the uniform average, as in torch."""
    theirs, ours = pair(batch_first=True)
    inputs = make_inputs("batch-first")
    mask = torch.full((L, S), torch.finfo(torch.float64).min, dtype=torch.float64)
    for need_weights in (True, False):
        expected, got = (m(*inputs, attn_mask=mask, need_weights=need_weights) for m in (theirs, ours))
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nan_in_padding_stays_there(weights: str) -> None:
    """A NaN in a padded key reaches neither the output of real positions nor the gradients of real inputs."""
    _, ours = pair(batch_first=True)
    query, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 5:] = True
    poisoned = memory.masked_fill(padding[..., None], float("nan"))

    def run(keys: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        leaves = [query.clone().requires_grad_(), keys.clone().requires_grad_()]
        out, w = ours(leaves[0], leaves[1], leaves[1], key_padding_mask=padding, **WEIGHTS[weights])
        grads = gradients((out, w), leaves)
        return out, w, grads[0], grads[1]

    for got, expected in zip(run(poisoned), run(memory), strict=True):
        assert_same(got, expected)


def test_two_float_masks_of_a_learned_kind_both_get_gradients() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(N, S, E, dtype=torch.float64)
    attn, padding = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((S, S), (N, S)))
    expected = gradients(theirs(x, x, x, attn_mask=attn, key_padding_mask=padding), [attn, padding])
    got = gradients(ours(x, x, x, attn_mask=attn, key_padding_mask=padding), [attn, padding])
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        assert_same(a, b)


@pytest.mark.parametrize("attn_mask", ["none", "bool-2d", "float-2d"])
@pytest.mark.parametrize("padding", ["bool", "float-of-bool"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_masks_stay_small(attn_mask: str, padding: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padding mask and an (L, S) mask reach the kernels unmerged: nothing of size N * L * S is made of them."""
    seen: list[Any] = []
    choose = fastattn.dispatch.choose
    monkeypatch.setattr(
        fastattn.dispatch, "choose", lambda problem, name: seen.append(problem) or choose(problem, name)
    )  # fmt: skip
    _, ours = pair(batch_first=True)
    mask = make_attn_mask(attn_mask, "batch-first")
    masks = {"attn_mask": mask, "key_padding_mask": make_padding(padding, "batch-first")}
    ours(*make_inputs("batch-first"), **masks, **WEIGHTS[weights])
    shapes = {tuple(x.shape) for x in (seen[0].dense_mask, seen[0].dense_bias) if x is not None}
    assert shapes == {(N, 1, 1, S)} | (set() if mask is None else {(1, 1, L, S)})


# State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_both_ways_and_same_initialisation(options: str) -> None:
    torch.manual_seed(5)
    theirs = TORCH(E, H, **OPTIONS[options])
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H, **OPTIONS[options])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    other = TORCH(E, H, **OPTIONS[options])
    assert not other.load_state_dict(ours.state_dict()).missing_keys
    assert not MultiheadAttention(E, H, **OPTIONS[options]).load_state_dict(other.state_dict()).unexpected_keys
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "in_proj_bias",
        "bias_k",
        "kdim",
        "vdim",
        "head_dim",
        "batch_first",
    ):
        assert type(getattr(ours, name)) is type(getattr(theirs, name))
    assert type(ours.out_proj) is type(theirs.out_proj)
    assert ours.extra_repr() == theirs.extra_repr()


def test_state_dict_of_the_wrong_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match="q_proj_weight"):
        MultiheadAttention(E, H).load_state_dict(TORCH(E, H, kdim=6).state_dict())


@pytest.mark.parametrize("arguments", [(0, 2), (8, 0), (-8, 2), (8, 3)])
def test_constructor_errors(arguments: tuple[int, int]) -> None:
    raised = []
    for cls in (TORCH, MultiheadAttention):
        with pytest.raises((ValueError, AssertionError)) as info:
            cls(*arguments)
        raised.append((type(info.value), str(info.value)))
    assert raised[0] == raised[1]


# Errors -----------------------------------------------------------------------------------------------------------

x3, x2 = torch.randn(N, L, E), torch.randn(L, E)
k3 = torch.randn(N, S, E)
BAD: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], dict[str, Any]]] = {
    # name: inputs, call keywords, module options
    "1-D query": ((x2[0], x2[0], x2[0]), {}, {}),
    "4-D query": ((x3[None], x3[None], x3[None]), {}, {}),
    "3-D query, 2-D key": ((x3, x2, k3), {}, {}),
    "3-D query, 2-D value": ((x3, k3, x2), {}, {}),
    "2-D query, 3-D key": ((x2, k3, k3), {}, {}),
    "batched, 1-D padding": ((x3, k3, k3), {"key_padding_mask": torch.zeros(S)}, {}),
    "unbatched, 2-D padding": ((x2, x2, x2), {"key_padding_mask": torch.zeros(1, L)}, {}),
    "batched, 1-D attn_mask": ((x3, k3, k3), {"attn_mask": torch.zeros(S)}, {}),
    "batched, 4-D attn_mask": ((x3, k3, k3), {"attn_mask": torch.zeros(N, H, L, S)}, {}),
    "unbatched, 4-D attn_mask": ((x2, x2, x2), {"attn_mask": torch.zeros(1, H, L, L)}, {}),
    "unbatched, wrong 3-D attn_mask": ((x2, x2, x2), {"attn_mask": torch.zeros(1, L, L)}, {}),
    "attn_mask (1, L, S)": ((x3, k3, k3), {"attn_mask": torch.zeros(1, L, S)}, {}),
    "attn_mask (N, L, S)": ((x3, k3, k3), {"attn_mask": torch.zeros(N, L, S, dtype=torch.bool)}, {}),
    "attn_mask (S, L)": ((x3, k3, k3), {"attn_mask": torch.zeros(S, L)}, {}),
    "attn_mask (1, S)": ((x3, k3, k3), {"attn_mask": torch.zeros(1, S)}, {}),
    "padding of another batch": ((x3, k3, k3), {"key_padding_mask": torch.zeros(N + 1, S)}, {}),
    "padding of another length": ((x3, k3, k3), {"key_padding_mask": torch.zeros(N, S - 1).bool()}, {}),
    "padding with added keys": ((x3, k3, k3), {"key_padding_mask": torch.zeros(N, S + 1)}, {"add_zero_attn": True}),
    "uint8 attn_mask": ((x3, k3, k3), {"attn_mask": torch.zeros(L, S, dtype=torch.uint8)}, {}),
    "int64 padding": ((x3, k3, k3), {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}, {}),
    "embedding of another size": ((x3[..., :4], k3, k3), {}, {}),
    "key unlike value": ((x3, k3, k3[:, 1:]), {}, {}),
    "key dims, one size": ((x3, k3[..., :4], k3[..., :4]), {}, {}),
    "key length unlike value's, separate": ((x3, k3, k3[:, 1:]), {}, {"kdim": E, "vdim": E + 1}),
    "kdim does not fit": ((x3, k3, k3), {}, {"kdim": 6}),
    "vdim does not fit": ((x3, k3, k3), {}, {"vdim": 6}),
}
# Where torch complains about its own views and casts, only the type is the same; ours says what is wrong.
BAD_TYPE_ONLY: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], dict[str, Any]]] = {
    "dtype of the query": ((x3.double(), k3, k3), {}, {}),
    "dtype of all": ((x3.double(), x3.double(), x3.double()), {}, {}),
    "batch of the keys": ((x3, k3[:2], k3[:2]), {}, {}),
    "batch of the keys, one": ((x3, k3[:1], k3[:1]), {}, {}),
    "float64 mask": ((x3, k3, k3), {"attn_mask": torch.zeros(L, S, dtype=torch.float64)}, {}),
    "bfloat16 mask": ((x3, k3, k3), {"attn_mask": torch.zeros(L, S, dtype=torch.bfloat16)}, {}),
    "float64 padding": ((x3, k3, k3), {"key_padding_mask": torch.zeros(N, S, dtype=torch.float64)}, {}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", [*BAD, *BAD_TYPE_ONLY])
def test_errors_are_torchs(case: str, batch_first: bool, need_weights: bool) -> None:
    inputs, keywords, options = {**BAD, **BAD_TYPE_ONLY}[case]
    if not batch_first and inputs[0].dim() == 3:
        inputs = tuple(x.transpose(0, 1) if x.dim() == 3 else x for x in inputs)
    before = [x.clone() for x in inputs]
    raised = []
    for cls in (TORCH, MultiheadAttention):
        with pytest.raises((AssertionError, RuntimeError)) as info:
            cls(E, H, batch_first=batch_first, **options)(*inputs, **keywords, need_weights=need_weights)
        raised.append(info.value)
    assert type(raised[1]) is type(raised[0])
    if case in BAD:
        assert str(raised[1]) == str(raised[0])
    else:
        assert any(word in str(raised[1]) for word in ("batch size", "attn_mask dtype", "same dtype"))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("missing", ["bias_k", "bias_v"])
def test_half_a_key_value_bias_is_an_error(missing: str) -> None:
    raised = []
    for cls in (TORCH, MultiheadAttention):
        module = cls(E, H, add_bias_kv=True, batch_first=True)
        setattr(module, missing, None)
        with pytest.raises(AssertionError) as info:
            module(x3, x3, x3)
        raised.append(str(info.value))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_out_of_range(dropout: float, need_weights: bool) -> None:
    module = MultiheadAttention(E, H, dropout=dropout)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        module(x3, x3, x3, need_weights=need_weights)
    module.eval()(x3, x3, x3, need_weights=need_weights)
