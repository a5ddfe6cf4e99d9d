"""Memory layout of operands and results."""

from __future__ import annotations

from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense and a tile of it spans less than 2**31 elements, else a copy.

    Kernels compute addresses inside a tile with the row stride's own width, which is 32 bits for most tensors.
    """
    if x.dim() == 4 and x.stride(2) * 256 >= 2**31:
        return x.contiguous()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_like_layout(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (B, H, S, D) tensor laid out in memory as (B, S, H, D) if `like` is, else contiguous."""
    batch, heads, length, dim = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty(shape)
