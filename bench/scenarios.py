"""What is computed: each scenario in fastattn's words, as the textbook formula, and for FlexAttention.

A scenario draws its own tensors (lengths, slopes, tables, ...), says what fastattn is called with, and gives the
additive bias and boolean mask in dense form, written independently of fastattn's `materialize`: the dense form feeds
both the fp64 oracle and the peers that know nothing but dense masks.  Queries sit at the end of the keys: query ``i``
has position ``i + Sk - Sq``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import fastattn
from fastattn.bench.encodings import encodings
from fastattn.bench.scenario import ALL_HEADS, Case, Extras, Scenario, Shape, distances, rotate

WINDOWS = {"window": 256, "window-1024": 1024}  # keys a windowed query sees, itself included
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128
TABLE_REACH = 64  # distances -64 .. 64 have their own entry in the learned distance table
SOFTCAP = 30.0
DROPOUT = 0.1
ROTARY_BASE = 10000.0


@dataclass
class Inputs:
    """Tensors of one case; every variant gets the same ones."""

    case: Case
    query: Tensor  # (B, Hq, Sq, D)
    key: Tensor  # (B, Hk, Sk, D)
    value: Tensor  # (B, Hk, Sk, Dv)
    grad_out: Tensor  # (B, Hq, Sq, Dv)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Everything a training step wants a gradient for, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        return named | {name: self.extras[name] for name in SCENARIOS[self.case.scenario].parameters}


def t5_bucket(distance: Tensor) -> Tensor:
    """Bidirectional bucket of a distance key - query: Raffel et al. (2020), as in the Mesh-TensorFlow code."""
    half = T5_BUCKETS // 2
    exact = half // 2
    size = distance.abs()
    # the published code computes in float32: so does this, or buckets at the edges differ
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


# What indexes a learned table is the same in every step: computed once, outside the clock.  One at a time is kept, as
# 32-bit numbers, for they are as large as a head's scores.
@functools.lru_cache(maxsize=1)
def _t5_index(shape: Shape, device: torch.device) -> Tensor:
    return t5_bucket(distances(shape, device)).int()


@functools.lru_cache(maxsize=1)
def _table_index(shape: Shape, device: torch.device) -> Tensor:
    return (distances(shape, device).clamp(-TABLE_REACH, TABLE_REACH) + TABLE_REACH).int()


@functools.lru_cache(maxsize=1)
def _steps(shape: Shape, device: torch.device) -> Tensor:
    """Sizes of the distances, (Sq, Sk)."""
    return distances(shape, device).abs().int()


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table (T, H) at index (Sq, Sk) as (H, Sq, Sk): an embedding, whose backward is much faster than an indexing's."""
    return torch.nn.functional.embedding(index, table).permute(2, 0, 1)


def _causal(shape: Shape, extras: Extras) -> Tensor:
    return distances(shape, extras["_device"].device) <= 0


def _lengths(shape: Shape, generator: torch.Generator) -> Extras:
    low = max(1, shape.key_length // 4)
    lengths = torch.randint(low, shape.key_length + 1, (shape.batch,), generator=generator)
    lengths[0] = shape.key_length
    return {"lengths": lengths}


def _left_padding(shape: Shape, generator: torch.Generator) -> Extras:
    """What a language model gives its attention for prompts of several lengths, padded in front."""
    padding = shape.key_length - _lengths(shape, generator)["lengths"]
    seen = torch.arange(shape.key_length) >= padding[:, None, None, None]
    return {"mask": seen & (distances(shape, seen.device) <= 0)}


def _prefix(shape: Shape, generator: torch.Generator) -> Extras:
    return {"prefix": torch.randint(0, shape.key_length // 2 + 1, (shape.batch,), generator=generator)}


def _documents(shape: Shape, generator: torch.Generator) -> Extras:
    """About four documents per row of the batch; ids grow along the keys."""
    starts = torch.rand(shape.batch, shape.key_length, generator=generator) < 4 / shape.key_length
    key_ids = starts.cumsum(-1)
    return {"key_ids": key_ids, "query_ids": key_ids[:, shape.offset :].clone()}


def _lonely_documents(shape: Shape, generator: torch.Generator) -> Extras:
    extras = _documents(shape, generator)
    extras["query_ids"][:, ::3] = -1  # every third query belongs to no document
    return extras


def rotary_tables(shape: Shape, generator: torch.Generator) -> Extras:
    half = shape.head_dim // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(shape.key_length, dtype=torch.float64)[:, None] * frequency
    return {"cos": angle.cos().float(), "sin": angle.sin().float()}


def _window_scenario(name: str, window: int) -> Scenario:
    return Scenario(
        name=name,
        title=f"causal sliding window of {window}",
        arguments=lambda shape, t: {"mask": fastattn.SlidingWindow(window - 1, 0)},
        dense_mask=lambda shape, t: _causal(shape, t) & (distances(shape, t["_device"].device) > -window),
        mask_mod=lambda shape, t: lambda b, h, i, j: (j <= i + shape.offset) & (j > i + shape.offset - window),
        visible=lambda shape, t: min(1.0, window / max(1, shape.key_length)),
    )


def _rotate_both(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    return rotate(query, t["cos"][shape.offset :], t["sin"][shape.offset :]), rotate(key, t["cos"], t["sin"])


def _same_document(shape: Shape, extras: Extras) -> Tensor:
    return (extras["query_ids"][:, :, None] == extras["key_ids"][:, None, :])[:, None]


def _document_scenario(name: str, title: str, draw: Callable[[Shape, torch.Generator], Extras]) -> Scenario:
    return Scenario(
        name=name,
        title=title,
        draw=draw,
        arguments=lambda shape, t: {"mask": fastattn.Documents(t["query_ids"], t["key_ids"])},
        dense_mask=_same_document,
        mask_mod=lambda shape, t: lambda b, h, i, j: t["query_ids"][b, i] == t["key_ids"][b, j],
        visible=lambda shape, t: _same_document(shape, t).double().mean().item(),
        empty_rows=name == "lonely-documents",
    )


def _build() -> dict[str, Scenario]:
    causal = Scenario(
        name="causal",
        title="causal mask",
        arguments=lambda shape, t: {"mask": fastattn.Causal()},
        dense_mask=_causal,
        mask_mod=lambda shape, t: lambda b, h, i, j: j <= i + shape.offset,
        visible=lambda shape, t: 0.5,
        causal=True,
    )
    bool_mask = Scenario(
        name="bool-mask",
        title="arbitrary boolean mask, one for all heads",
        draw=lambda shape, generator: {
            "mask": torch.rand(shape.batch, 1, shape.query_length, shape.key_length, generator=generator) < 0.8
        },
        arguments=lambda shape, t: {"mask": fastattn.BoolMask(t["mask"])},
        dense_mask=lambda shape, t: t["mask"],
        mask_mod=lambda shape, t: lambda b, h, i, j: t["mask"][b, 0, i, j],
        empty_rows=True,
    )
    eight = torch.float8_e4m3fn
    scenarios = [
        Scenario(name="plain", title="no mask, no bias"),
        causal,
        Scenario(name="float8", title="no mask, numbers of float8_e4m3fn", numbers=eight),
        replace(causal, name="float8-causal", title="causal mask, numbers of float8_e4m3fn", numbers=eight),
        *(_window_scenario(name, window) for name, window in WINDOWS.items()),
        Scenario(
            name="lengths",
            title="padding: key lengths",
            draw=_lengths,
            arguments=lambda shape, t: {"mask": fastattn.KeyLengths(t["lengths"])},
            dense_mask=lambda shape, t: (
                torch.arange(shape.key_length, device=t["lengths"].device) < t["lengths"][:, None, None, None]
            ),
            mask_mod=lambda shape, t: lambda b, h, i, j: j < t["lengths"][b],
            visible=lambda shape, t: t["lengths"].double().mean().item() / shape.key_length,
        ),
        Scenario(
            name="prefix",
            title="prefix language model",
            draw=_prefix,
            arguments=lambda shape, t: {"mask": fastattn.PrefixLM(t["prefix"])},
            dense_mask=lambda shape, t: (
                _causal(shape, t)
                | (torch.arange(shape.key_length, device=t["prefix"].device) < t["prefix"][:, None, None, None])
            ),
            mask_mod=lambda shape, t: lambda b, h, i, j: (j <= i + shape.offset) | (j < t["prefix"][b]),
            visible=lambda shape, t: 0.5,
        ),
        _document_scenario("documents", "packed documents", _documents),
        _document_scenario("lonely-documents", "queries that see no key", _lonely_documents),
        bool_mask,
        replace(
            bool_mask,
            name="left-padding",
            title="causal mask and padding in front as one boolean mask",
            draw=_left_padding,
            visible=lambda shape, t: t["mask"].double().mean().item(),
        ),
        replace(
            causal,
            name="alibi",
            title="causal + ALiBi",
            draw=lambda shape, generator: {"slopes": fastattn.alibi_slopes(shape.heads)},
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "bias": fastattn.ALiBi(t["slopes"])},
            dense_bias=lambda shape, t, heads: -t["slopes"][heads, None, None] * _steps(shape, t["slopes"].device),
            score_mod=lambda shape, t: lambda s, b, h, i, j: s - t["slopes"][h] * (i + shape.offset - j).abs(),
            causal=False,
            without="causal",
        ),
        Scenario(
            name="alibi-learned",
            title="ALiBi with learned slopes",
            draw=lambda shape, generator: {"slopes": fastattn.alibi_slopes(shape.heads)},
            arguments=lambda shape, t: {"bias": fastattn.ALiBi(t["slopes"])},
            dense_bias=lambda shape, t, heads: -t["slopes"][heads, None, None] * _steps(shape, t["slopes"].device),
            score_mod=lambda shape, t: lambda s, b, h, i, j: s - t["slopes"][h] * (i + shape.offset - j).abs(),
            parameters={"slopes": 0},
        ),
        Scenario(
            name="t5",
            title="T5 bias, gradient of its table",
            draw=lambda shape, generator: {"weight": torch.randn(T5_BUCKETS, shape.heads, generator=generator)},
            arguments=lambda shape, t: {"bias": fastattn.T5Bias(t["weight"], max_distance=T5_MAX_DISTANCE)},
            dense_bias=lambda shape, t, heads: _look_up(t["weight"][:, heads], _t5_index(shape, t["weight"].device)),
            score_mod=lambda shape, t: lambda s, b, h, i, j: s + t["weight"][t5_bucket(j - i - shape.offset), h],
            parameters={"weight": 1},
        ),
        Scenario(
            name="table",
            title="learned distance table",
            draw=lambda shape, generator: {"table": torch.randn(shape.heads, 2 * TABLE_REACH + 1, generator=generator)},
            arguments=lambda shape, t: {"bias": fastattn.DistanceTable(t["table"], left=TABLE_REACH)},
            dense_bias=lambda shape, t, heads: _look_up(t["table"][heads].T, _table_index(shape, t["table"].device)),
            score_mod=lambda shape, t: (
                lambda s, b, h, i, j: (
                    s + t["table"][h, (j - i - shape.offset).clamp(-TABLE_REACH, TABLE_REACH) + TABLE_REACH]
                )
            ),
            parameters={"table": 0},
        ),
        Scenario(
            name="dense-bias",
            title="dense bias (H, Sq, Sk), with its gradient",
            draw=lambda shape, generator: {
                "bias": torch.randn(1, shape.heads, shape.query_length, shape.key_length, generator=generator)
            },
            arguments=lambda shape, t: {"bias": fastattn.DenseBias(t["bias"])},
            dense_bias=lambda shape, t, heads: t["bias"][:, heads],
            score_mod=lambda shape, t: lambda s, b, h, i, j: s + t["bias"][0, h, i, j],
            parameters={"bias": 1},
        ),
        replace(
            causal,
            name="rotary",
            title="causal + rotary",
            draw=rotary_tables,
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "rotary": fastattn.Rotary(t["cos"], t["sin"])},
            transform=_rotate_both,
            without="causal",
        ),
        replace(
            causal,
            name="softcap",
            title=f"causal + softcap {SOFTCAP:g}",
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "softcap": SOFTCAP},
            score_mod=lambda shape, t: lambda s, b, h, i, j: SOFTCAP * torch.tanh(s / SOFTCAP),
            softcap=SOFTCAP,
            causal=False,
            without="causal",
        ),
        replace(
            causal,
            name="sink",
            title="causal + learned sink",
            draw=lambda shape, generator: {"sink": torch.randn(shape.heads, generator=generator)},
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "sink": t["sink"]},
            parameters={"sink": 0},
            sink=True,
            causal=False,
            without="causal",
        ),
        Scenario(
            name="dropout",
            title=f"dropout {DROPOUT:g}",
            arguments=lambda shape, t: {"dropout_p": DROPOUT},
            dropout_p=DROPOUT,
        ),
    ]
    return {scenario.name: scenario for scenario in (*scenarios, *encodings(causal))}


SCENARIOS = _build()


def make_inputs(case: Case, device: torch.device | str, seed: int = 0, *, spread: float = 1.0) -> Inputs:
    """Random normal inputs (zeros would time faster than any user's data); parameters stay float32 as in training.

    Drawn on the CPU, so that every device sees the same numbers; float64 cases keep float64 parameters.
    """
    shape, scenario = case.shape, SCENARIOS[case.scenario]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, numbers: torch.dtype | None = None) -> Tensor:
        drawn = spread * torch.randn(*size, generator=generator)
        return (drawn if numbers is None else drawn.to(numbers)).to(case.dtype).to(device)

    def operand(heads: int, length: int, dim: int) -> Tensor:
        return normal(shape.batch, heads, length, dim, numbers=scenario.numbers).requires_grad_()

    query = operand(shape.heads, shape.query_length, shape.head_dim)
    key = operand(shape.kv_heads, shape.key_length, shape.head_dim)
    value = operand(shape.kv_heads, shape.key_length, shape.value_dim)
    grad_out = normal(shape.batch, shape.heads, shape.query_length, shape.value_dim)
    extras = {}
    for name, tensor in scenario.draw(shape, generator).items():
        if tensor.is_floating_point() and case.dtype == torch.float64:
            tensor = tensor.double()
        extras[name] = tensor.to(device).requires_grad_(name in scenario.parameters)
    extras["_device"] = torch.empty(0, device=device)  # where scenarios without tensors of their own build masks
    return Inputs(case, query, key, value, grad_out, extras)


def naive_attention(
    inputs: Inputs, *, mask: Tensor | None, bias: Tensor | None, dropout: bool = True, heads: slice = ALL_HEADS
) -> Tensor:
    """softmax(cap(scale q k^T) + bias, masked) v in plain torch, in the dtype of the inputs: what everyone starts from.

    `mask` (True = may attend) and `bias` broadcast to (B, heads, Sq, Sk); `heads` says which of the sink's it uses.
    """
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    query, key, value = inputs.query, inputs.key, inputs.value
    if scenario.transform is not None:
        dtype = query.dtype
        rounded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.extras.items()}
        query, key = (x.to(dtype) for x in scenario.transform(shape, rounded, query, key, heads))
    if key.shape[1] != query.shape[1]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (1 / math.sqrt(shape.head_dim))
    if scenario.softcap:
        scores = scenario.softcap * torch.tanh(scores / scenario.softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if scenario.sink:
        sink = inputs.extras["sink"][heads].to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if scenario.empty_rows and mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    if scenario.dropout_p and dropout:
        weights = torch.nn.functional.dropout(weights, scenario.dropout_p)
    weights = weights.to(value.dtype)
    out = weights @ value
    return out if scenario.value_term is None else out + scenario.value_term(shape, inputs.extras, weights, heads)


def dense_terms(inputs: Inputs, heads: slice = ALL_HEADS) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) of the case in dense form; the bias is a differentiable function of the scenario's parameters."""
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    mask = scenario.dense_mask(shape, inputs.extras) if scenario.dense_mask else None
    if scenario.dense_bias is None:
        return mask, None
    operands = {"_query": inputs.query, "_key": inputs.key}
    return mask, scenario.dense_bias(shape, inputs.extras | operands, heads)


def forward_flops(inputs: Inputs) -> float:
    """2·B·H·Sq·Sk·(D + Dv), which is the field's 4·B·H·Sq·Sk·D, times the share of pairs that the mask lets through.

    The share is 1/2 for causal masks (the diagonal is ignored, as everyone does), window/Sk for windows, the mean
    over the batch for lengths and documents, and 1 for arbitrary masks.  Softmax, bias and rotation count nothing.
    Backward counts 2.5 times as much: five products against two.
    """
    shape, scenario = inputs.case.shape, SCENARIOS[inputs.case.scenario]
    pairs = shape.batch * shape.heads * shape.query_length * shape.key_length
    return 2.0 * pairs * (shape.head_dim + shape.value_dim) * scenario.visible(shape, inputs.extras)


def attention_bytes(inputs: Inputs, direction: str) -> float:
    """Bytes that have to cross the memory once, whoever computes it.

        forward    |Q| + |K| + |V| + |O|                 read, read, read, written
        backward   2 (|Q| + |K| + |V|) + 2 |O|           Q, K, V, O, dO read, dQ, dK, dV written

    Both with the tensors of mask and bias beside them; "both" is the sum.
    """
    if direction == "both":
        return attention_bytes(inputs, "forward") + attention_bytes(inputs, "backward")
    operands = inputs.query.nbytes + inputs.key.nbytes + inputs.value.nbytes
    beside = sum(tensor.nbytes for tensor in inputs.extras.values())
    return (1 if direction == "forward" else 2) * (operands + inputs.grad_out.nbytes) + beside


FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
