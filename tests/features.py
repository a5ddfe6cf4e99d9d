"""Every optional stage of attention as a test sees it: its tensors, the fastattn object, and the plain formula.

The formulas here are written from the definitions, not from fastattn: explicit position grids, a dense mask, a dense
bias.  `oracle.Call` joins any number of features into one call.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import fastattn
from fastattn.positional.deberta import Disentangled
from fastattn.positional.relative import KERPLE, Sandwich
from fastattn.positional.shaw import ShawKeys


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    query_length: int = 33
    key_length: int = 49
    head_dim: int = 16
    value_dim: int = 24


@dataclass
class Scene:
    """What a feature may look at when it draws its tensors."""

    shape: Shape
    dtype: torch.dtype
    offset: int | Tensor
    generator: torch.Generator
    scale: float = 1.0

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def randint(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=self.generator)

    def bools(self, *size: int, keep: float = 0.6) -> Tensor:
        return torch.rand(size, generator=self.generator) < keep

    @property
    def position(self) -> Tensor:
        """(B|1, 1, Sq, 1) position of each query among the keys."""
        offset = self.offset if isinstance(self.offset, Tensor) else torch.tensor([self.offset])
        return offset.view(-1, 1, 1, 1) + torch.arange(self.shape.query_length).view(1, 1, -1, 1)

    @property
    def column(self) -> Tensor:
        return torch.arange(self.shape.key_length).view(1, 1, 1, -1)

    @property
    def distance(self) -> Tensor:
        """(B|1, 1, Sq, Sk), negative for keys before the query."""
        return self.column - self.position


Tensors = dict[str, Tensor]


@dataclass
class Feature:
    """One optional stage.

    `leaves` are differentiated; `public` turns them into keywords of `fastattn.attention`; `mask`, `bias` and
    `rotate` give its share of the plain formula from the same leaves in any dtype.
    """

    leaves: Tensors = field(default_factory=dict)
    public: Callable[[Tensors], dict[str, object]] = lambda leaves: {}
    mask: Tensor | None = None
    bias: Callable[[Tensors], Tensor] | None = None
    of_content: bool = False  # the bias is a product with query or key, linear in each and in every leaf
    rotate: Callable[[Tensors, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    softcap: float | None = None


def moved(value: Any, device: str) -> Any:
    """A tensor, or a mask, bias or rotation and all that is in it, on a device; what is there already stays itself."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if type(value).__module__.startswith("fastattn."):
        twin = copy.copy(value)
        for name, inner in vars(value).items():
            setattr(twin, name, moved(inner, device))
        return twin
    return value


FEATURES: dict[str, Callable[[Scene], Feature]] = {}


def _feature(make: Callable[[Scene], Feature]) -> Callable[[Scene], Feature]:
    FEATURES[make.__name__] = make
    return make


def _masked(mask: Tensor, public: fastattn.Mask) -> Feature:
    return Feature(mask=mask, public=lambda _: {"mask": public})


@_feature
def causal(scene: Scene) -> Feature:
    return _masked(scene.column <= scene.position, fastattn.Causal())


@_feature
def window(scene: Scene) -> Feature:
    near = (scene.column >= scene.position - 5) & (scene.column <= scene.position + 3)
    return _masked(near, fastattn.SlidingWindow(5, 3))


@_feature
def window_left(scene: Scene) -> Feature:
    return _masked(scene.column >= scene.position - 7, fastattn.SlidingWindow(7, None))


@_feature
def window_right(scene: Scene) -> Feature:
    return _masked(scene.column <= scene.position + 9, fastattn.SlidingWindow(None, 9))


@_feature
def window_diagonal(scene: Scene) -> Feature:
    return _masked(scene.column == scene.position, fastattn.SlidingWindow(0, 0))


@_feature
def key_lengths(scene: Scene) -> Feature:
    lengths = scene.randint(0, scene.shape.key_length + 1, scene.shape.batch)
    return _masked(scene.column < lengths.view(-1, 1, 1, 1), fastattn.KeyLengths(lengths))


@_feature
def prefix_lm(scene: Scene) -> Feature:
    prefix = scene.randint(0, scene.shape.key_length + 3, scene.shape.batch)
    seen = (scene.column <= scene.position) | (scene.column < prefix.view(-1, 1, 1, 1))
    return _masked(seen, fastattn.PrefixLM(prefix.int()))


@_feature
def documents(scene: Scene) -> Feature:
    s = scene.shape
    query_ids, key_ids = scene.randint(-1, 3, s.batch, s.query_length), scene.randint(-1, 3, s.batch, s.key_length)
    same = query_ids[:, None, :, None] == key_ids[:, None, None, :]
    return _masked(same, fastattn.Documents(query_ids, key_ids))


@_feature
def documents_sorted(scene: Scene) -> Feature:
    s = scene.shape
    query_ids, key_ids = scene.randint(0, 4, s.query_length).sort()[0], scene.randint(0, 4, s.key_length).sort()[0]
    return _masked((query_ids[:, None] == key_ids)[None, None], fastattn.Documents(query_ids, key_ids))


def _bool_mask(name: str, *size: str) -> None:
    def make(scene: Scene) -> Feature:
        mask = scene.bools(*[1 if axis == "1" else getattr(scene.shape, axis) for axis in size])
        return _masked(mask, fastattn.BoolMask(mask))

    FEATURES[name] = make


_bool_mask("bool_full", "batch", "heads", "query_length", "key_length")
_bool_mask("bool_matrix", "query_length", "key_length")
_bool_mask("bool_keys", "batch", "1", "1", "key_length")
_bool_mask("bool_queries", "1", "heads", "query_length", "1")


@_feature
def bool_bands(scene: Scene) -> Feature:
    """Each query of each head sees keys in a row of its own, some none."""
    s = scene.shape
    first = scene.randint(0, s.key_length + 1, s.heads, s.query_length, 1)
    count = scene.randint(-2, s.key_length // 2 + 1, s.heads, s.query_length, 1)
    seen = (scene.column >= first) & (scene.column < first + count)
    return _masked(seen, fastattn.BoolMask(seen))


@_feature
def bool_blocks(scene: Scene) -> Feature:
    """Each head of each sequence sees blocks on the diagonal, of lengths of its own."""
    s = scene.shape
    query_ids = scene.randint(0, 4, s.batch, s.heads, s.query_length, 1).sort(2)[0]
    key_ids = scene.randint(0, 4, s.batch, s.heads, 1, s.key_length).sort(3)[0]
    return _masked(query_ids == key_ids, fastattn.BoolMask(query_ids == key_ids))


def _dense_bias(name: str, *size: str, scale: float = 1.0) -> None:
    def make(scene: Scene) -> Feature:
        tensor = scene.randn(*[1 if axis == "1" else getattr(scene.shape, axis) for axis in size]) * scale
        return Feature(
            leaves={name: tensor},
            public=lambda leaves: {"bias": fastattn.DenseBias(leaves[name])},
            bias=lambda leaves: leaves[name],
        )

    FEATURES[name] = make


_dense_bias("dense_full", "batch", "heads", "query_length", "key_length")
_dense_bias("dense_heads", "1", "heads", "query_length", "key_length")
_dense_bias("dense_batch", "batch", "1", "query_length", "key_length")
_dense_bias("dense_matrix", "query_length", "key_length")
_dense_bias("dense_keys", "batch", "1", "1", "key_length")
_dense_bias("dense_rows", "heads", "query_length", "1")
_dense_bias("dense_scalar")


@_feature
def dense_infinite(scene: Scene) -> Feature:
    """-inf entries mask, whole rows of them included."""
    s = scene.shape
    tensor = scene.randn(s.heads, s.query_length, s.key_length)
    tensor = tensor.masked_fill(~scene.bools(s.heads, s.query_length, s.key_length), -math.inf)
    tensor = tensor.masked_fill(~scene.bools(s.heads, s.query_length, 1, keep=0.9), -math.inf)
    return Feature(
        leaves={"dense_infinite": tensor},
        public=lambda leaves: {"bias": fastattn.DenseBias(leaves["dense_infinite"])},
        bias=lambda leaves: leaves["dense_infinite"],
    )


def _batched(x: Tensor, rank: int) -> Tensor:
    return x if x.dim() == rank else x[None]


def _alibi(name: str, batched: bool) -> None:
    def make(scene: Scene) -> Feature:
        s = scene.shape
        slopes = scene.randn(*([s.batch] if batched else []), s.heads, dtype=scene.parameter_dtype) * 0.2
        return Feature(
            leaves={name: slopes},
            public=lambda leaves: {"bias": fastattn.ALiBi(leaves[name])},
            bias=lambda leaves: -_batched(leaves[name], 2)[..., None, None] * scene.distance.abs(),
        )

    FEATURES[name] = make


_alibi("alibi", batched=False)
_alibi("alibi_batch", batched=True)


@_feature
def alibi_sides(scene: Scene) -> Feature:
    """A slope before and another after; one leaf holds both."""
    slopes = scene.randn(2, scene.shape.heads, dtype=scene.parameter_dtype) * 0.2

    def bias(leaves: Tensors) -> Tensor:
        before, after = (x[None, :, None, None] for x in leaves["alibi_sides"])
        distance = scene.distance
        return before * distance.clamp(max=0) - after * distance.clamp(min=0)

    return Feature(
        leaves={"alibi_sides": slopes},
        public=lambda leaves: {"bias": fastattn.ALiBi(*leaves["alibi_sides"])},
        bias=bias,
    )


@_feature
def alibi_one_way(scene: Scene) -> Feature:
    """Heads in turn see only what is before, or only what is after."""
    slopes = scene.randn(scene.shape.heads, dtype=scene.parameter_dtype).abs() * 0.2
    back = torch.arange(scene.shape.heads) % 2 == 0

    def public(leaves: Tensors) -> dict[str, object]:
        slopes = leaves["alibi_one_way"]
        hidden = torch.full_like(slopes, math.inf)
        return {"bias": fastattn.ALiBi(torch.where(back, slopes, hidden), torch.where(back, hidden, slopes))}

    def bias(leaves: Tensors) -> Tensor:
        seen = torch.where(back[:, None, None], scene.distance <= 0, scene.distance >= 0)
        bias = -leaves["alibi_one_way"][:, None, None] * scene.distance.abs()
        return bias.masked_fill(~seen, -math.inf)

    return Feature(leaves={"alibi_one_way": slopes}, public=public, bias=bias)


def _kerple(kind: Literal["log", "power"]) -> None:
    def make(scene: Scene) -> Feature:
        size = (2, scene.shape.heads)
        parameters = 0.2 + torch.rand(size, generator=scene.generator, dtype=torch.float64).to(scene.parameter_dtype)
        name = f"kerple_{kind}"

        def bias(leaves: Tensors) -> Tensor:
            (r1, r2), size = leaves[name][:, :, None, None], scene.distance.abs()
            if kind == "log":
                return -r1 * torch.log(1 + r2 * size)
            return -r1 * torch.where(size == 0, 0.0, torch.exp(r2 * torch.log(size.clamp(min=1).to(r2.dtype))))

        return Feature(
            leaves={name: parameters},
            public=lambda leaves: {"bias": KERPLE(*leaves[name], kind)},
            bias=bias,
        )

    FEATURES[f"kerple_{kind}"] = make


_kerple("log")
_kerple("power")


@_feature
def sandwich(scene: Scene) -> Feature:
    """The authors' construction: products of sinusoidal embeddings, no parameters."""
    heads, dim = scene.shape.heads, 12

    def embeddings(position: Tensor) -> Tensor:
        angle = position[..., None].double() / 10000.0 ** (2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
        return torch.cat((angle.sin(), angle.cos()), -1)

    queries, keys = embeddings(scene.position[..., 0]), embeddings(scene.column[..., 0, :])
    ratio = torch.arange(1, heads + 1, dtype=torch.float64) * 8 / heads
    return Feature(
        public=lambda _: {"bias": Sandwich(heads, dim)},
        bias=lambda _: queries @ keys.transpose(-1, -2) / ratio[:, None, None],
    )


def _lookup(table: Tensor, distance: Tensor, left: int) -> Tensor:
    """table (B|1, H, T) at clamp(distance) (B|1, 1, Sq, Sk)."""
    index = distance.clamp(-left, table.shape[-1] - 1 - left) + left
    batch = max(table.shape[0], distance.shape[0])
    rows = [table[min(b, table.shape[0] - 1)][:, index[min(b, index.shape[0] - 1), 0]] for b in range(batch)]
    return torch.stack(rows) if rows else table.new_zeros(0, table.shape[1], *distance.shape[2:])


def _table(name: str, columns: int, left: int, batched: bool = False) -> None:
    def make(scene: Scene) -> Feature:
        s = scene.shape
        table = scene.randn(*([s.batch] if batched else []), s.heads, columns, dtype=scene.parameter_dtype)
        return Feature(
            leaves={name: table},
            public=lambda leaves: {"bias": fastattn.DistanceTable(leaves[name], left=left)},
            bias=lambda leaves: _lookup(_batched(leaves[name], 3), scene.distance, left),
        )

    FEATURES[name] = make


_table("table", 15, 7)
_table("table_one_sided", 12, 11)
_table("table_right", 6, 0)
_table("table_one_column", 1, 0)
_table("table_wide", 401, 200)
_table("table_batch", 21, 8, batched=True)


def t5_bucket(distance: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    """The published bucket function, one distance at a time, its logarithm in exact integer comparisons."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = buckets // 2
    if n < exact:
        return base + n
    steps = buckets - exact
    # largest k with log(n/exact)/log(max/exact)*steps >= k, that is n^steps * exact^k >= max^k * exact^steps
    k = 0
    while k < steps - 1 and n**steps * exact ** (k + 1) >= max_distance ** (k + 1) * exact**steps:
        k += 1
    return base + exact + k


def _t5(name: str, bidirectional: bool) -> None:
    def make(scene: Scene) -> Feature:
        weight = scene.randn(8, scene.shape.heads, dtype=scene.parameter_dtype)

        def bias(leaves: Tensors) -> Tensor:
            buckets = [t5_bucket(d, 8, bidirectional, 20) for d in scene.distance.flatten().tolist()]
            index = torch.tensor(buckets, dtype=torch.int64).view(scene.distance.shape)[:, 0]
            return leaves[name][index].permute(0, 3, 1, 2)

        return Feature(
            leaves={name: weight},
            public=lambda leaves: {"bias": fastattn.T5Bias(leaves[name], bidirectional, max_distance=20)},
            bias=bias,
        )

    FEATURES[name] = make


_t5("t5_encoder", bidirectional=True)
_t5("t5_decoder", bidirectional=False)


def _read_rows(products: Tensor, index: Tensor) -> Tensor:
    """products (B, H, Sq, C) at index (B|1, 1, Sq, Sk), column by column."""
    total = products.new_zeros(())
    for column in range(products.shape[-1]):
        total = total + products[..., column, None] * (index == column)
    return total


@_feature
def shaw(scene: Scene) -> Feature:
    """A vector per clipped distance, shared by the heads."""
    vectors = scene.randn(7, scene.shape.head_dim, dtype=scene.parameter_dtype)

    def bias(leaves: Tensors) -> Tensor:
        products = leaves["query"].to(leaves["shaw"].dtype) @ leaves["shaw"].mT
        return _read_rows(products, scene.distance.clamp(-3, 3) + 3) * scene.scale

    return Feature(
        leaves={"shaw": vectors}, public=lambda leaves: {"bias": ShawKeys(leaves["shaw"])}, bias=bias, of_content=True
    )


def deberta_bucket(distance: int, buckets: int | None, max_distance: int) -> int:
    """The published bucket of a distance i - j, one at a time."""
    if buckets is None or abs(distance) <= buckets // 2:
        return distance
    middle = buckets // 2
    far = math.log(abs(distance) / middle) / math.log((max_distance - 1) / middle) * (middle - 1)
    return (math.ceil(far - 1e-5) + middle) * (1 if distance > 0 else -1)


def _deberta(name: str, terms: tuple[str, ...], buckets: int | None) -> None:
    def make(scene: Scene) -> Feature:
        s, span = scene.shape, 6
        sizes = {"c2p": s.heads, "p2c": s.kv_heads}
        leaves = {
            f"{name}.{n}": scene.randn(sizes[n], 2 * span, s.head_dim, dtype=scene.parameter_dtype) for n in terms
        }

        def public(leaves: Tensors) -> dict[str, object]:
            both = (leaves.get(f"{name}.{n}") for n in ("c2p", "p2c"))
            return {"bias": Disentangled(*both, max_distance=16, buckets=buckets)}

        def bias(leaves: Tensors) -> Tensor:
            where = [deberta_bucket(-d, buckets, 16) for d in scene.distance.flatten().tolist()]
            index = torch.tensor(where, dtype=torch.int64).view(scene.distance.shape) + span
            index = index.clamp(0, 2 * span - 1)
            total = torch.zeros(())
            if "c2p" in terms:
                vectors = leaves[f"{name}.c2p"]
                total = total + _read_rows(leaves["query"].to(vectors.dtype) @ vectors.mT, index)
            if "p2c" in terms:
                vectors = leaves[f"{name}.p2c"]
                products = (leaves["key"].to(vectors.dtype) @ vectors.mT).repeat_interleave(s.heads // s.kv_heads, 1)
                total = total + _read_rows(products, index.mT).mT
            return total * scene.scale

        return Feature(leaves=leaves, public=public, bias=bias, of_content=True)

    FEATURES[name] = make


_deberta("deberta", ("c2p", "p2c"), buckets=8)
_deberta("deberta_c2p", ("c2p",), buckets=8)
_deberta("deberta_v1", ("c2p", "p2c"), buckets=None)
_deberta("deberta_v1_p2c", ("p2c",), buckets=None)


def _spin(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) with its leading 2 * angle.shape[-1] dimensions turned by a complex factor (B|1, S, R/2)."""
    half = angle.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half)).movedim(-1 if interleaved else -2, -1)
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle[:, None])
    return torch.cat((spun.movedim(-1, -1 if interleaved else -2).flatten(-2), rest), dim=-1)


def _rotary(
    name: str, interleaved: bool = False, partial: bool = False, separate: bool = False, batched: bool = False,
    learned: bool = False, trailing: bool = False,
) -> None:  # fmt: skip
    def make(scene: Scene) -> Feature:
        s = scene.shape
        half = max(1, s.head_dim // 4) if partial else s.head_dim // 2
        offset = scene.offset if isinstance(scene.offset, Tensor) else torch.tensor([scene.offset])
        last = int(offset.max()) + s.query_length if offset.numel() else s.query_length
        rows = max(s.key_length, last, 1) + 3
        size = (s.batch, rows, half) if batched else (rows, half)

        def draw() -> tuple[Tensor, Tensor]:
            angle, amplitude = scene.randn(*size, dtype=torch.float64) * 3, 1.3 if separate else 1.0
            return tuple((amplitude * f(angle)).to(scene.parameter_dtype) for f in (torch.cos, torch.sin))

        cos, sin = draw()
        key_cos, key_sin = draw() if separate else (cos, sin)
        tables = {"cos": cos, "sin": sin}
        if separate:
            tables |= {"key_cos": key_cos, "key_sin": key_sin}

        def given(leaves: Tensors) -> Tensors:
            return {n: leaves.get(f"{name}.{n}", t) for n, t in tables.items()}

        def rotate(leaves: Tensors, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            # The rotation of a naive half-precision model: turned in float32, stored in the model's dtype.
            dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            t = {n: _batched(x.to(dtype), 3) for n, x in given(leaves).items()}
            key_angle = torch.complex(t.get("key_cos", t["cos"]), t.get("key_sin", t["sin"]))[:, : s.key_length]
            angle = torch.complex(t["cos"], t["sin"])
            index = offset[:, None] + torch.arange(s.query_length)
            batch = torch.arange(max(index.shape[0], angle.shape[0]))[:, None]
            angle = angle[batch.clamp(max=angle.shape[0] - 1), index[batch[:, 0].clamp(max=index.shape[0] - 1)]]
            first = s.head_dim - 2 * half if trailing else 0

            def turn(x: Tensor, angle: Tensor) -> Tensor:
                spun = _spin(x[..., first:].to(dtype), angle, interleaved)
                return torch.cat((x[..., :first], spun.to(x.dtype)), dim=-1)

            return turn(query, angle), turn(key, key_angle)

        return Feature(
            leaves={f"{name}.{n}": t for n, t in tables.items()} if learned else {},
            public=lambda leaves: {
                "rotary": fastattn.Rotary(interleaved=interleaved, trailing=trailing, **given(leaves))
            },
            rotate=rotate,
        )

    FEATURES[name] = make


_rotary("rotary")
_rotary("rotary_interleaved", interleaved=True)
_rotary("rotary_partial", partial=True)
_rotary("rotary_partial_interleaved", partial=True, interleaved=True)
_rotary("rotary_separate", separate=True)
_rotary("rotary_batch", batched=True)
_rotary("rotary_learned", learned=True, separate=True)
_rotary("rotary_trailing", partial=True, trailing=True)
_rotary("rotary_trailing_interleaved", partial=True, trailing=True, interleaved=True, separate=True)


@_feature
def softcap(scene: Scene) -> Feature:
    return Feature(softcap=1.5, public=lambda _: {"softcap": 1.5})


def _sink(name: str, batched: bool) -> None:
    def make(scene: Scene) -> Feature:
        size = (scene.shape.batch, scene.shape.heads) if batched else (scene.shape.heads,)
        return Feature(
            leaves={name: scene.randn(*size, dtype=scene.parameter_dtype) + 1.0},
            public=lambda leaves: {"sink": leaves[name]},
        )

    FEATURES[name] = make


_sink("sink", batched=False)
_sink("sink_batch", batched=True)

ROTARY = tuple(name for name in FEATURES if name.startswith("rotary"))
SINKS = ("sink", "sink_batch")
MASKS = tuple(n for n in FEATURES if n.startswith(("causal", "window", "key_l", "prefix", "doc", "bool")))
BIASES = tuple(n for n in FEATURES if n.startswith(("dense", "alibi", "table", "t5", "kerple", "sandwich")))
CONTENT = tuple(n for n in FEATURES if n.startswith(("shaw", "deberta")))  # biases that need query or key
assert {*ROTARY, *SINKS, *MASKS, *BIASES, *CONTENT, "softcap"} == set(FEATURES)
