"""Relative positions of image transformers, as modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn.biases import DenseBias
from fastattn.positional.content import Route
from fastattn.positional.decomposed import Decomposed
from fastattn.positional.windows import cosine_attention, log_spaced_offsets, window_bias
from fastattn.validation import check_index

__all__ = ["CosineAttention", "DecomposedBias", "SwinBias", "SwinV2Bias"]

INITIAL_STD = 0.02


class SwinBias(nn.Module):
    """Swin's bias of a window, with `table` ((2 Wh - 1)(2 Ww - 1), H): loads `relative_position_bias_table`.

    Each call gives the `bias` argument of `attention` for windows as the batch, shared by all of them.  For shifted
    windows add ``mask=Documents(shifted_window_ids(...).repeat(batch, 1))``.  Formula, memory and errors:
    `fastattn.positional.windows.window_bias`.
    """

    def __init__(
        self,
        num_heads: int,
        window: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (check_index("window", size, least=1) for size in window)
        self.window = height, width
        rows = (2 * height - 1) * (2 * width - 1)
        self.table = nn.Parameter(torch.empty(rows, num_heads, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.table, std=INITIAL_STD)

    def extra_repr(self) -> str:
        return f"{self.table.shape[1]}, window={self.window}"

    def forward(self) -> DenseBias:
        return DenseBias(window_bias(self.table, self.window))


class SwinV2Bias(nn.Module):
    """Swin v2's bias: a network of log-spaced offsets, bounded to (0, 16) (Liu et al., "Swin transformer v2", 2022)::

        bias[h, i, j] = 16 sigmoid(network(offset(i, j)))[h]

    with `network` Linear(2, hidden), ReLU, Linear(hidden, H) without bias.  It sees each of the (2 Wh - 1)(2 Ww - 1)
    offsets once; the result is a dense bias of H N^2 numbers, N = Wh Ww, read again for every window.

    Args:
        num_heads: H.
        window: (Wh, Ww).
        pretrained_window: the window of pretraining, where it was another.
        hidden: units of the network.
    """

    def __init__(
        self,
        num_heads: int,
        window: tuple[int, int],
        pretrained_window: tuple[int, int] | None = None,
        hidden: int = 512,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (check_index("window", size, least=1) for size in window)
        self.window, self.pretrained_window = (height, width), pretrained_window
        where = {"device": device, "dtype": dtype}
        self.network = nn.Sequential(
            nn.Linear(2, hidden, **where), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False, **where)
        )

    def extra_repr(self) -> str:
        return f"window={self.window}, pretrained_window={self.pretrained_window}"

    def forward(self) -> DenseBias:
        weight = self.network[0].weight
        offsets = log_spaced_offsets(self.window, self.pretrained_window, dtype=weight.dtype).to(weight.device)
        table = 16 * torch.sigmoid(self.network(offsets))
        return DenseBias(window_bias(table, self.window))


class CosineAttention(nn.Module):
    """Attention by cosine similarity with a learned temperature per head, `logit_scale` (H, 1, 1), as in Swin v2.

    Formula and errors: `fastattn.positional.windows.cosine_attention`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        initial_scale: float = 10.0,
        largest: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.largest = largest
        start = torch.full((num_heads, 1, 1), math.log(initial_scale), device=device, dtype=dtype)
        self.logit_scale = nn.Parameter(start)

    def extra_repr(self) -> str:
        return f"{len(self.logit_scale)}, largest={self.largest:g}"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **arguments: object) -> Tensor:
        """(B, Hq, Sq, Dv); `arguments` of `fastattn.attention`, except scale."""
        return cosine_attention(query, key, value, self.logit_scale, largest=self.largest, **arguments)


class DecomposedBias(nn.Module):
    """Decomposed relative positions of MViTv2, ViTDet and SAM, with `rows` (2 H - 1, D) and `columns` (2 W - 1, D).

    Loads `rel_pos_h` and `rel_pos_w`.  Each call gives the `bias` argument of `attention`.  Formula, routes and
    errors: `fastattn.positional.decomposed.Decomposed`.

    Args:
        head_dim: D.
        query_size: (height, width) of the queries' grid.
        key_size: of the keys'; default query_size.
        prefix, route: as in `Decomposed`.
    """

    def __init__(
        self,
        head_dim: int,
        query_size: tuple[int, int],
        key_size: tuple[int, int] | None = None,
        *,
        prefix: int = 0,
        route: Route = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size = query_size, query_size if key_size is None else key_size
        self.prefix, self.route = prefix, route
        for name, sizes in zip(("rows", "columns"), zip(self.query_size, self.key_size, strict=True), strict=True):
            vectors = nn.Parameter(torch.empty(2 * max(sizes) - 1, head_dim, device=device, dtype=dtype))
            nn.init.trunc_normal_(vectors, std=INITIAL_STD)
            self.register_parameter(name, vectors)
        self()  # checks the numbers now

    def extra_repr(self) -> str:
        return f"query_size={self.query_size}, key_size={self.key_size}, prefix={self.prefix}, route={self.route!r}"

    def forward(self) -> Decomposed:
        return Decomposed(
            self.rows, self.columns, self.query_size, self.key_size, prefix=self.prefix, route=self.route
        )  # fmt: skip
