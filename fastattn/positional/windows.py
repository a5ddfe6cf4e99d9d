"""Window attention of Swin transformers: the bias of a window, the regions of shifted windows, cosine attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.validation import check_device, check_floating, check_index, check_shape, fail

__all__ = ["cosine_attention", "log_spaced_offsets", "shifted_window_ids", "window_bias"]


def window_index(window: tuple[int, int]) -> Tensor:
    """(N, N) int64, N = Wh Ww: the entry of a table of ((2 Wh - 1)(2 Ww - 1),) offsets for each pair of a window."""
    height, width = (check_index("window", size, least=1) for size in window)
    row = torch.arange(height).repeat_interleave(width)
    col = torch.arange(width).repeat(height)
    down = row[:, None] - row + height - 1
    right = col[:, None] - col + width - 1
    return down * (2 * width - 1) + right


def window_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Swin's relative position bias of one window, the same for all of them (Liu et al., "Swin transformer", 2021)::

        bias[h, i, j] = table[(row_i - row_j + Wh - 1)(2 Ww - 1) + col_i - col_j + Ww - 1, h]

    Args:
        table: ((2 Wh - 1)(2 Ww - 1), H) floating, `relative_position_bias_table`.
        window: (Wh, Ww).

    Returns:
        (H, N, N) with N = Wh Ww, for `fastattn.DenseBias`: H N^2 numbers, which the kernels read again for every window
        of the batch.  Its gradient is summed over the windows inside the kernel, then over pairs into the table.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    check_floating("table", table)
    index = window_index(window)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    if table.dim() != 2 or table.shape[0] != rows:
        fail(ValueError, "table", f"shape ({rows}, H) for a window of {window[0]} x {window[1]}", table)
    # an embedding, whose backward is much faster than an indexing's
    bias = torch.nn.functional.embedding(index.to(table.device), table)
    return bias.permute(2, 0, 1).contiguous()


def shifted_window_ids(
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The region of each token of each window after a cyclic shift of the image (Liu et al., 2021).

    Tokens of a window may see each other if they were neighbours before the shift, that is, if their ids are equal:
    ``Documents(ids.repeat(batch, 1))`` for windows in the order (batch, windows), in place of a mask per window.

    Args:
        height, width: of the image in tokens, multiples of the window.
        window: (Wh, Ww).
        shift: by how much the image was rolled up and left, 0 <= shift < window.

    Returns:
        (number of windows, Wh Ww) int64.

    Raises:
        TypeError, ValueError: sizes that do not fit.
    """
    regions = []
    for name, size, side, by in (("height", height, window[0], shift[0]), ("width", width, window[1], shift[1])):
        size, side = check_index(name, size, least=1), check_index("window", side, least=1)
        if size % side:
            fail(ValueError, name, f"a multiple of the window's {side}", size)
        if not 0 <= check_index("shift", by) < side:
            fail(ValueError, "shift", f"an int in [0, {side - 1}]", by)
        place = torch.arange(size, device=device)
        # without a shift the last window is one region like any other
        regions.append((place >= size - side).long() + (place >= size - by).long() if by else torch.zeros_like(place))
    ids = regions[0][:, None] * 3 + regions[1]
    tiles = ids.view(height // window[0], window[0], width // window[1], window[1])
    return tiles.transpose(1, 2).reshape(-1, window[0] * window[1])


def log_spaced_offsets(
    window: tuple[int, int], pretrained_window: tuple[int, int] | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """((2 Wh - 1)(2 Ww - 1), 2): the offsets of a window as Swin v2's network sees them (Liu et al., CVPR 2022)::

        sign(x) log2(|x| + 1) / log2(8),   x = 8 offset / (size - 1)

    with the size of the window the model was pretrained with, where that is another.
    """
    axes = []
    for side, trained in zip(window, pretrained_window or window, strict=True):
        offset = torch.arange(1 - side, side, dtype=torch.float64) * 8 / max(1, trained - 1)
        axes.append(offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).to(dtype)


def cosine_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logit_scale: Tensor,
    *,
    largest: float = 100.0,
    **arguments: object,
) -> Tensor:
    """Attention by cosine similarity with a learned temperature per head (Liu et al., "Swin transformer v2", 2022)::

        S[i, j] = min(exp(logit_scale_h), largest) * cos(q_i, k_j) + bias

    Queries are normalized and scaled, keys normalized, in float32 before the kernel: a copy of both.

    Args:
        query, key, value: as in `fastattn.attention`.
        logit_scale: (Hq,) or (Hq, 1, 1) floating, the logarithm of the temperature's inverse; its gradient is 0 where
            it is clamped.
        largest: bound of exp(logit_scale).
        arguments: of `fastattn.attention`, except scale.

    Raises:
        TypeError, ValueError: as `fastattn.attention`, and for a logit_scale of another shape or device.
    """
    turned, keys = cosine_operands(query, key, logit_scale, largest=largest)
    return attention(turned, keys, value, scale=1.0, **arguments)  # type: ignore[call-overload,no-any-return]


def cosine_operands(query: Tensor, key: Tensor, logit_scale: Tensor, *, largest: float) -> tuple[Tensor, Tensor]:
    """The query and key whose product is the score of `cosine_attention`, which documents arguments and errors."""
    check_floating("logit_scale", logit_scale)
    if check_floating("query", query).dim() != 4:
        fail(ValueError, "query", "four dimensions (batch, heads, length, head_dim)", query)
    heads = query.shape[1]
    check_shape("logit_scale", logit_scale, (heads,), (heads, 1, 1))
    check_device("logit_scale", logit_scale, query.device)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor = logit_scale.to(wide).clamp(max=math.log(largest)).exp().view(heads, 1, 1)
    turned = torch.nn.functional.normalize(query.to(wide), dim=-1) * factor
    keys = torch.nn.functional.normalize(check_floating("key", key).to(wide), dim=-1)
    return turned.to(query.dtype), keys.to(key.dtype)
