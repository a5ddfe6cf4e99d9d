"""Positional encodings as scenarios: in fastattn's words, and as their users write them today.

The dense forms are written from the papers, with the shortcuts that public code takes (a product with a table of
relative vectors, then a gather), not from fastattn's objects.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn
from fastattn.bench.scenario import Extras, Scenario, Shape, distances, rotate
from fastattn.positional import (
    FIRE,
    KERPLE,
    Decomposed,
    Disentangled,
    Sandwich,
    ShawKeys,
    TransformerXL,
    rotary_angles,
    rotary_tables,
    section_pairs,
    window_bias,
    xpos_scale,
)
from fastattn.positional.content import WIDEST_HEAD

SHAW_REACH = 16
XL_WIDTH, XL_WIDE = 128, 512  # widths of the sinusoid: beside a head it fits, and a model's
DEBERTA_BUCKETS, DEBERTA_DISTANCE = 64, 512
FIRE_UNITS = 32
SANDWICH_DIM = 128
XPOS_BASE = 512.0
ROTARY_BASE = 10000.0


def grid(tokens: int) -> tuple[int, int]:
    """The squarest (height, width) of so many tokens."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0) if tokens else 1
    return height, tokens // height


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, H, Sq, C) at index (Sq, Sk)."""
    return rows.gather(-1, index.expand(*rows.shape[:2], -1, -1))


def _grouped(t: Extras) -> Tensor:
    """The key, once for each query head."""
    query, key = t["_query"], t["_key"]
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _operands(t: Extras, like: Tensor) -> tuple[Tensor, Tensor]:
    return t["_query"].to(like.dtype), _grouped(t).to(like.dtype)


def _scale(shape: Shape) -> float:
    return 1 / math.sqrt(shape.head_dim)


# -- functions of the distance ----------------------------------------------------------------------------------------


def _kerple(shape: Shape, t: Extras, heads: slice, kind: str) -> Tensor:
    r1, r2 = t["r1"][heads, None, None], t["r2"][heads, None, None]
    size = distances(shape, r1.device).abs()
    return -r1 * torch.log(1 + r2 * size) if kind == "log" else -r1 * size.to(r2.dtype) ** r2


def _sandwich(shape: Shape, t: Extras, heads: slice) -> Tensor:
    """By the distance: the products of embeddings that the paper starts from lose digits that float64 cases need."""
    device = t["_device"].device
    step = 2 * torch.arange(SANDWICH_DIM // 2, dtype=torch.float64, device=device) / SANDWICH_DIM
    reach = max(shape.query_length, shape.key_length)
    by_distance = (torch.arange(reach, device=device)[:, None] / 10000.0**step).cos().sum(-1)
    ratio = torch.arange(1, shape.heads + 1, dtype=torch.float64, device=device)[heads] * 8 / shape.heads
    return (by_distance[distances(shape, device).abs()] / ratio[:, None, None]).to(t["_query"].dtype)


def _draw_fire(shape: Shape, generator: torch.Generator) -> Extras:
    return {
        "w2": torch.randn(shape.heads, FIRE_UNITS, generator=generator),
        "w1": torch.randn(FIRE_UNITS, generator=generator),
        "b1": torch.randn(FIRE_UNITS, generator=generator),
        "c": torch.tensor(0.1),
    }


def _fire_network(t: Extras, heads: slice = slice(None)):
    def network(x: Tensor) -> Tensor:
        return torch.relu(x * t["w1"] + t["b1"]) @ t["w2"][heads].T

    return network


def _fire(shape: Shape, t: Extras, heads: slice) -> Tensor:
    distance = distances(shape, t["c"].device).abs()
    position = torch.arange(shape.query_length, device=distance.device)[:, None] + shape.offset
    top = position.clamp(min=512).to(t["c"].dtype)
    x = torch.log((t["c"] * distance).abs() + 1) / (torch.log((t["c"] * top).abs() + 1) + 1e-6)
    return _fire_network(t, heads)(x[..., None]).permute(2, 0, 1)


# -- content ----------------------------------------------------------------------------------------------------------


def _clipped(shape: Shape, device: torch.device) -> Tensor:
    return distances(shape, device).clamp(-SHAW_REACH, SHAW_REACH) + SHAW_REACH


def _shaw(shape: Shape, t: Extras, heads: slice) -> Tensor:
    query, _ = _operands(t, t["a"])
    return _gather(_scale(shape) * (query @ t["a"][heads].mT), _clipped(shape, query.device))


def _shaw_values(shape: Shape, t: Extras, weights: Tensor, heads: slice) -> Tensor:
    vectors = t["b"][heads].to(weights.dtype)
    index = _clipped(shape, weights.device).expand(weights.shape)
    return weights.new_zeros(*weights.shape[:3], vectors.shape[1]).scatter_add(-1, index, weights) @ vectors


def _xl(shape: Shape, t: Extras, heads: slice) -> Tensor:
    """The product with all relative vectors, then the shift of rows by padding and reshaping."""
    query, key = _operands(t, t["weight"])
    queries, keys, weight = shape.query_length, shape.key_length, t["weight"][heads]
    distance = torch.arange(keys - 1, -queries, -1, device=query.device)  # i - j from the farthest key on
    width = weight.shape[-1]
    angle = distance[:, None] / 10000.0 ** (torch.arange(0, width, 2, device=query.device, dtype=torch.float64) / width)
    vectors = torch.cat((angle.sin(), angle.cos()), -1).to(weight.dtype) @ weight.mT  # (H, Sq + Sk - 1, D)
    rows = (query + t["v"][heads, None]) @ vectors.mT
    shifted = F.pad(rows, (1, 0)).flatten(-2)[..., queries:].unflatten(-1, (queries, queries + keys - 1))[..., :keys]
    return _scale(shape) * (shifted + t["u"][heads, None] @ key.mT)


def _draw_xl(width: int):
    def draw(shape: Shape, generator: torch.Generator) -> Extras:
        def normal(*size: int) -> Tensor:
            return torch.randn(shape.heads, shape.head_dim, *size, generator=generator)

        return {"weight": normal(width) * width**-0.5, "u": normal(), "v": normal()}

    return draw


def _deberta_index(shape: Shape, device: torch.device) -> Tensor:
    distance = -distances(shape, device)
    middle = DEBERTA_BUCKETS // 2
    size = distance.abs().clamp(min=middle)
    far = torch.log(size / middle) / math.log((DEBERTA_DISTANCE - 1) / middle) * (middle - 1)
    bucket = torch.where(distance.abs() <= middle, distance, (far.ceil().long() + middle) * distance.sign())
    return (bucket + DEBERTA_BUCKETS).clamp(0, 2 * DEBERTA_BUCKETS - 1)


def _deberta(shape: Shape, t: Extras, heads: slice) -> Tensor:
    query, key = _operands(t, t["kr"])
    index = _deberta_index(shape, query.device)
    content_to_position = _gather(query @ t["kr"][heads].mT, index)
    position_to_content = _gather(key @ t["qr"].mT, index.T).mT
    return _scale(shape) * (content_to_position + position_to_content)


def _draw_deberta(shape: Shape, generator: torch.Generator) -> Extras:
    size = (2 * DEBERTA_BUCKETS, shape.head_dim)
    return {
        "kr": torch.randn(shape.heads, *size, generator=generator),
        "qr": torch.randn(*size, generator=generator),
    }


# -- images -----------------------------------------------------------------------------------------------------------


def _draw_sam(shape: Shape, generator: torch.Generator) -> Extras:
    sizes = zip(grid(shape.query_length), grid(shape.key_length), strict=True)
    tables = [torch.randn(2 * max(pair) - 1, shape.head_dim, generator=generator) * 0.1 for pair in sizes]
    return {"rows": tables[0], "columns": tables[1]}


def _sam(shape: Shape, t: Extras, heads: slice) -> Tensor:
    query, _ = _operands(t, t["rows"])
    sizes = list(zip(grid(shape.query_length), grid(shape.key_length), strict=True))
    vectors = []
    for table, (queries, keys) in zip((t["rows"], t["columns"]), sizes, strict=True):
        at_query = torch.arange(queries, device=query.device)[:, None] * max(keys / queries, 1.0)
        at_key = torch.arange(keys, device=query.device) * max(queries / keys, 1.0)
        vectors.append(table[(at_query - at_key + (keys - 1) * max(queries / keys, 1.0)).long()])
    tiles = query.unflatten(2, grid(shape.query_length))
    by_row = torch.einsum("bhrcd,rkd->bhrck", tiles, vectors[0])
    by_col = torch.einsum("bhrcd,ckd->bhrck", tiles, vectors[1])
    return (by_row[..., :, None] + by_col[..., None, :]).flatten(-2).flatten(2, 3)


def _draw_swin(shape: Shape, generator: torch.Generator) -> Extras:
    height, width = grid(shape.key_length)
    return {"table": torch.randn((2 * height - 1) * (2 * width - 1), shape.heads, generator=generator)}


def _swin(shape: Shape, t: Extras, heads: slice) -> Tensor:
    height, width = grid(shape.key_length)
    place = torch.arange(shape.key_length, device=t["table"].device)
    row, col = place // width, place % width
    index = (row[:, None] - row + height - 1) * (2 * width - 1) + col[:, None] - col + width - 1
    return F.embedding(index[shape.offset :], t["table"][:, heads]).permute(2, 0, 1)


# -- rotations --------------------------------------------------------------------------------------------------------


def _inv_freq(width: int) -> Tensor:
    return ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def _tables(angle: Tensor, names: str = "cos sin") -> Extras:
    return dict(zip(names.split(), (angle.cos().float(), angle.sin().float()), strict=True))


def _draw_trailing(shape: Shape, generator: torch.Generator) -> Extras:
    width = max(2, shape.head_dim // 4 * 2)
    return _tables(torch.arange(shape.key_length)[:, None] * _inv_freq(width))


def _turn_trailing(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    first = shape.head_dim - 2 * t["cos"].shape[-1]
    turned = [
        torch.cat((x[..., :first], rotate(x[..., first:], t["cos"][skip:], t["sin"][skip:])), -1)
        for x, skip in ((query, shape.offset), (key, 0))
    ]
    return turned[0], turned[1]


def _draw_mrope(shape: Shape, generator: torch.Generator) -> Extras:
    """Time, height and width of every token, drawn; sections of a fourth and the rest in halves, as Qwen2-VL's."""
    half = shape.head_dim // 2
    sections = (half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2)
    positions = torch.randint(0, 1000, (3, shape.batch, shape.key_length), generator=generator)
    return _tables(rotary_angles(positions, _inv_freq(shape.head_dim)[:half], section_pairs(sections)))


def _turn_mrope(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    cos, sin = t["cos"][:, None], t["sin"][:, None]
    return rotate(query, cos[:, :, shape.offset :], sin[:, :, shape.offset :]), rotate(key, cos, sin)


def _draw_xpos(shape: Shape, generator: torch.Generator) -> Extras:
    width = shape.head_dim // 2 * 2
    positions = torch.arange(shape.key_length)
    angle = positions[:, None] * _inv_freq(width)
    scale = xpos_scale(positions, width, shape.key_length // 2, XPOS_BASE)
    tables = {"cos": angle.cos() * scale, "sin": angle.sin() * scale}
    tables |= {"key_cos": angle.cos() / scale, "key_sin": angle.sin() / scale}
    return {name: table.float() for name, table in tables.items()}


def _turn_xpos(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    turned = rotate(query, t["cos"][shape.offset :], t["sin"][shape.offset :])
    return turned, rotate(key, t["key_cos"], t["key_sin"])


def _learned_tables(shape: Shape, t: Extras) -> tuple[Tensor, Tensor]:
    inv_freq = t["inv_freq"]
    positions = torch.arange(shape.key_length, device=inv_freq.device)
    return rotary_tables(rotary_angles(positions, inv_freq.double()), dtype=inv_freq.dtype)


def _turn_learned(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    angle = torch.arange(shape.key_length, device=query.device)[:, None] * t["inv_freq"]
    cos, sin = angle.cos(), angle.sin()
    return rotate(query, cos[shape.offset :], sin[shape.offset :]), rotate(key, cos, sin)


def _turn_cosine(shape: Shape, t: Extras, query: Tensor, key: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
    """The formula's 1/sqrt(D) is taken back."""
    temperature = t["logit_scale"][heads].clamp(max=math.log(100.0)).exp() * math.sqrt(shape.head_dim)
    return F.normalize(query, dim=-1) * temperature[:, None, None], F.normalize(key, dim=-1)


def encodings(causal: Scenario) -> list[Scenario]:
    """Every encoding that attention sees; those for causal models on top of the `causal` scenario."""

    def rotated(name: str, title: str, **fields: object) -> Scenario:
        return replace(causal, name=name, title=f"causal + {title}", **fields)  # type: ignore[arg-type]

    def masked(name: str, title: str, **fields: object) -> Scenario:
        return replace(causal, name=name, title=f"causal + {title}", causal=False, **fields)  # type: ignore[arg-type]

    return [
        rotated(
            "rotary-trailing", "rotary of the last half",
            draw=_draw_trailing, transform=_turn_trailing,
            arguments=lambda shape, t: {
                "mask": fastattn.Causal(), "rotary": fastattn.Rotary(t["cos"], t["sin"], trailing=True)
            },
        ),
        rotated(
            "rotary-learned", "rotary, gradient of its frequencies",
            draw=lambda shape, generator: {"inv_freq": _inv_freq(shape.head_dim // 2 * 2).float()},
            transform=_turn_learned, parameters={"inv_freq": None},
            arguments=lambda shape, t: {
                "mask": fastattn.Causal(), "rotary": fastattn.Rotary(*_learned_tables(shape, t))
            },
        ),
        rotated(
            "mrope", "M-RoPE, positions of each sequence",
            draw=_draw_mrope, transform=_turn_mrope,
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "rotary": fastattn.Rotary(t["cos"], t["sin"])},
        ),
        rotated(
            "xpos", "xPos",
            draw=_draw_xpos, transform=_turn_xpos,
            arguments=lambda shape, t: {
                "mask": fastattn.Causal(),
                "rotary": fastattn.Rotary(t["cos"], t["sin"], key_cos=t["key_cos"], key_sin=t["key_sin"]),
            },
        ),
        Scenario(
            name="alibi-sides",
            title="ALiBi, a learned slope for each side",
            draw=lambda shape, generator: {
                "slopes": fastattn.alibi_slopes(shape.heads), "after": 0.5 * fastattn.alibi_slopes(shape.heads)
            },
            arguments=lambda shape, t: {"bias": fastattn.ALiBi(t["slopes"], after=t["after"])},
            dense_bias=lambda shape, t, heads: (
                t["slopes"][heads, None, None] * distances(shape, t["slopes"].device).clamp(max=0)
                - t["after"][heads, None, None] * distances(shape, t["slopes"].device).clamp(min=0)
            ),
            score_mod=lambda shape, t: lambda s, b, h, i, j: torch.where(
                j > i + shape.offset, s - t["after"][h] * (j - i - shape.offset),
                s + t["slopes"][h] * (j - i - shape.offset),
            ),
            parameters={"slopes": 0, "after": 0},
        ),
        masked(
            "kerple", "KERPLE, logarithmic",
            draw=lambda shape, generator: {
                name: torch.rand(shape.heads, generator=generator) + 0.1 for name in ("r1", "r2")
            },
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "bias": KERPLE(t["r1"], t["r2"])},
            dense_bias=lambda shape, t, heads: _kerple(shape, t, heads, "log"),
            score_mod=lambda shape, t: lambda s, b, h, i, j: (
                s - t["r1"][h] * torch.log(1 + t["r2"][h] * (j - i - shape.offset).abs())
            ),
            parameters={"r1": 0, "r2": 0},
        ),
        masked(
            "kerple-power", "KERPLE, power",
            draw=lambda shape, generator: {
                "r1": torch.rand(shape.heads, generator=generator) * 0.1 + 0.01,
                "r2": torch.rand(shape.heads, generator=generator) + 0.1,
            },
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "bias": KERPLE(t["r1"], t["r2"], "power")},
            dense_bias=lambda shape, t, heads: _kerple(shape, t, heads, "power"),
            parameters={"r1": 0, "r2": 0},
        ),
        masked(
            "sandwich", "Sandwich",
            arguments=lambda shape, t: {"mask": fastattn.Causal(), "bias": Sandwich(shape.heads, SANDWICH_DIM)},
            dense_bias=_sandwich,
        ),
        masked(
            "fire", "FIRE, gradient of its network",
            draw=_draw_fire,
            arguments=lambda shape, t: {
                "mask": fastattn.Causal(), "bias": FIRE(_fire_network(t), t["c"], torch.full_like(t["c"], 512.0))
            },
            dense_bias=_fire,
            parameters={"w2": 0, "w1": None, "b1": None, "c": None},
        ),
        Scenario(
            name="shaw-keys",
            title=f"Shaw's vectors beside keys, {2 * SHAW_REACH + 1}",
            draw=lambda shape, generator: {
                "a": torch.randn(shape.heads, 2 * SHAW_REACH + 1, shape.head_dim, generator=generator)
            },
            arguments=lambda shape, t: {"bias": ShawKeys(t["a"])},
            dense_bias=_shaw,
            parameters={"a": 0},
            of_content=True,
        ),
        Scenario(
            name="shaw",
            title="Shaw's vectors beside keys and values",
            draw=lambda shape, generator: {
                "a": torch.randn(shape.heads, 2 * SHAW_REACH + 1, shape.head_dim, generator=generator),
                "b": torch.randn(shape.heads, 2 * SHAW_REACH + 1, shape.value_dim, generator=generator),
            },
            name_of_function="shaw_attention",
            arguments=lambda shape, t: {"key_embeddings": t["a"], "value_embeddings": t["b"]},
            dense_bias=_shaw,
            value_term=_shaw_values,
            parameters={"a": 0, "b": 0},
            of_content=True,
        ),
        *[
            Scenario(
                name=name,
                title=f"Transformer-XL, sinusoids of width {width}",
                draw=_draw_xl(width),
                arguments=lambda shape, t: {"bias": TransformerXL(t["weight"], t["u"], t["v"])},
                dense_bias=_xl,
                parameters={"weight": 0, "u": 0, "v": 0},
                of_content=True,
                appended=lambda shape, width=width: width if shape.head_dim + width <= WIDEST_HEAD else 0,
            )
            for name, width in (("transformer-xl", XL_WIDTH), ("transformer-xl-wide", XL_WIDE))
        ],
        Scenario(
            name="deberta",
            title="DeBERTa, c2p and p2c",
            draw=_draw_deberta,
            arguments=lambda shape, t: {
                "bias": Disentangled(t["kr"], t["qr"], max_distance=DEBERTA_DISTANCE, buckets=DEBERTA_BUCKETS)
            },
            dense_bias=_deberta,
            parameters={"kr": 0, "qr": None},
            of_content=True,
        ),
        Scenario(
            name="sam",
            title="decomposed positions of SAM",
            draw=_draw_sam,
            arguments=lambda shape, t: {
                "bias": Decomposed(t["rows"], t["columns"], grid(shape.query_length), grid(shape.key_length))
            },
            dense_bias=_sam,
            parameters={"columns": None, "rows": None},
            of_content=True,
            appended=lambda shape: sum(grid(shape.key_length)),
        ),
        Scenario(
            name="swin",
            title="window bias of Swin",
            draw=_draw_swin,
            arguments=lambda shape, t: {
                "bias": fastattn.DenseBias(window_bias(t["table"], grid(shape.key_length))[:, shape.offset :])
            },
            dense_bias=_swin,
            parameters={"table": 1},
        ),
        Scenario(
            name="cosine",
            title="cosine attention of Swin v2",
            draw=lambda shape, generator: {"logit_scale": torch.full((shape.heads,), math.log(10.0))},
            name_of_function="cosine_attention",
            arguments=lambda shape, t: {"logit_scale": t["logit_scale"]},
            transform=_turn_cosine,
            parameters={"logit_scale": 0},
        ),
    ]  # fmt: skip
