"""Relative positions that depend on the contents, as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.positional.content import Route
from fastattn.positional.deberta import Disentangled
from fastattn.positional.shaw import shaw_attention
from fastattn.positional.transformer_xl import TransformerXL
from fastattn.validation import check_index, fail

__all__ = ["DisentangledBias", "ShawAttention", "TransformerXLBias"]

INITIAL_STD = 0.02


class ShawAttention(nn.Module):
    """Attention with Shaw's relative vectors beside keys and values, shared by the heads.

    Parameters `key_embeddings` (2 k + 1, D) and `value_embeddings` (2 k + 1, Dv).  Formula, memory and errors:
    `fastattn.positional.shaw.shaw_attention`.

    Args:
        head_dim: D.
        max_distance: k.
        value_dim: Dv; default D.
        keys, values: whether there are vectors beside them.
    """

    def __init__(
        self,
        head_dim: int,
        max_distance: int,
        *,
        value_dim: int | None = None,
        keys: bool = True,
        values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = 2 * check_index("max_distance", max_distance, least=0) + 1
        dims = {"key_embeddings": head_dim if keys else 0, "value_embeddings": (value_dim or head_dim) if values else 0}
        for name, dim in dims.items():
            vectors = nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype)) if dim else None
            self.register_parameter(name, vectors)
            if vectors is not None:
                nn.init.normal_(vectors, std=INITIAL_STD)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **arguments: object) -> Tensor:
        """(B, Hq, Sq, Dv) of query (B, Hq, Sq, D), key, value; `arguments` of `shaw_attention`."""
        return shaw_attention(query, key, value, self.key_embeddings, self.value_embeddings, **arguments)  # type: ignore[arg-type]


class TransformerXLBias(nn.Module):
    """Transformer-XL's position term with its parameters; each call gives the `bias` argument of `attention`.

    Parameters: `weight` (H D, E), `r_net.weight` of the published code; `u` and `v` (H, D), its `r_w_bias` and
    `r_r_bias`.  Formula, routes and errors: `fastattn.positional.transformer_xl.TransformerXL`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        width: int,
        *,
        clamp: int | None = None,
        route: Route = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.clamp, self.route = clamp, route
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim, width, device=device, dtype=dtype))
        self.u = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INITIAL_STD)
        self()  # checks the numbers now

    def extra_repr(self) -> str:
        heads, dim = self.u.shape
        return f"{heads}, head_dim={dim}, width={self.weight.shape[1]}, clamp={self.clamp}, route={self.route!r}"

    def forward(self) -> TransformerXL:
        weight = self.weight.unflatten(0, tuple(self.u.shape))
        return TransformerXL(weight, self.u, self.v, clamp=self.clamp, route=self.route)


class DisentangledBias(nn.Module):
    """DeBERTa's two position terms; each call gives the `bias` argument of `attention`.

    The table of relative embeddings belongs to the model, which shares and normalizes it: it comes with the call.
    Formula, memory and errors: `fastattn.positional.deberta.Disentangled`.

    Args:
        embed_dim: E, of the relative embeddings.
        num_heads: H; must divide E.
        max_distance, buckets, route: as in `Disentangled`.
        c2p, p2c: which terms there are.

    Attributes:
        key_projection, query_projection: Linear(E, E), `pos_key_proj` and `pos_query_proj` of the published code.
            Where a model shares them with its content (`share_att_key`), assign its own.
        scale: 1 / sqrt(D * number of terms), for `attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        max_distance: int = 512,
        buckets: int | None = 256,
        c2p: bool = True,
        p2c: bool = True,
        route: Route = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if check_index("embed_dim", embed_dim, least=1) % check_index("num_heads", num_heads, least=1):
            fail(ValueError, "num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        if not (c2p or p2c):
            fail(ValueError, "c2p", "True, or p2c", c2p)
        where = {"device": device, "dtype": dtype}
        self.num_heads, self.max_distance, self.buckets, self.route = num_heads, max_distance, buckets, route
        self.key_projection = nn.Linear(embed_dim, embed_dim, **where) if c2p else None
        self.query_projection = nn.Linear(embed_dim, embed_dim, **where) if p2c else None
        self.scale = (embed_dim // num_heads * (1 + c2p + p2c)) ** -0.5

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, max_distance={self.max_distance}, buckets={self.buckets}, "
            f"route={self.route!r}"
        )

    def forward(self, relative_embeddings: Tensor) -> Disentangled:
        """The bias of relative embeddings (2 span, E), as the model hands them to its layers."""
        projected = [
            None
            if projection is None
            else projection(relative_embeddings).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for projection in (self.key_projection, self.query_projection)
        ]
        return Disentangled(*projected, max_distance=self.max_distance, buckets=self.buckets, route=self.route)
