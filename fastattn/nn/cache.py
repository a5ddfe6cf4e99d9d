"""Keys and values of earlier tokens, kept for incremental decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.masks import Causal, Mask, SlidingWindow
from fastattn.validation import check_floating, check_index, check_integer, check_shape, check_tensor, fail

__all__ = ["DecodingCache", "KVCache", "LayerCache", "MemoryCache"]


class CachedKeys(NamedTuple):
    """What a step attends to, its own tokens last; views of the cache wherever that is possible."""

    key: Tensor  # (B, Hk, S, D)
    value: Tensor  # (B, Hk, S, D)
    first: int  # the position of key 0
    padding: Tensor | None  # bool (B, S), True = ignore


class KVCache:
    """Keys and values of one attention module, in buffers that are allocated once.

    Pass it as `cache` to `fastattn.nn.MultiheadAttention`: each call appends its tokens and attends, causally, to all
    of them.  Keys are kept as projected, before any rotation, so that rotary tables and relative biases see every key
    at its own position.  For inference: a call that would need a gradient raises.

    Static, with `max_length`: room for that many tokens; one more is an error.  Sliding, with `window`: a token
    attends to the last `window` tokens, itself included (`SlidingWindow(window - 1, 0)`), and older ones are dropped.
    The sliding buffers hold 2 * window tokens, and the last window moves to their front when they are full: nothing is
    allocated in a step of up to window + 1 tokens; a longer one, such as the prompt, joins old and new in one copy.

    Args:
        batch_size: B.
        num_heads: of keys and values, Hk.
        head_dim: D.
        max_length, window: exactly one of them.
        device, dtype: of the projected keys and values.

    Attributes:
        length: tokens seen so far, which is the position of the next one.

    Raises:
        TypeError, ValueError: numbers out of range; both or none of max_length and window.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        max_length: int | None = None,
        window: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (max_length is None) == (window is None):
            fail(ValueError, "max_length, window", "exactly one of them", "both" if window is not None else "none")
        self.window = None if window is None else check_index("window", window, least=1)
        self.capacity = check_index("max_length", max_length, least=1) if window is None else 2 * self.window  # type: ignore[operator]
        sizes = [
            check_index(name, size, least=least)
            for name, size, least in (("batch_size", batch_size, 0), ("num_heads", num_heads, 1))
        ]
        shape = (*sizes, self.capacity, check_index("head_dim", head_dim, least=1))
        self.key = torch.empty(shape, device=device, dtype=dtype)
        self.value = torch.empty(shape, device=device, dtype=dtype)
        check_floating("dtype", self.key)
        self.padding: Tensor | None = None  # (B, capacity), made when the first mask comes
        self.length = 0
        self._start = self._stop = 0  # of the tokens in the buffers

    def __repr__(self) -> str:
        kind = f"max_length={self.capacity}" if self.window is None else f"window={self.window}"
        batch, heads, _, dim = self.key.shape
        return f"KVCache({batch}, {heads}, {dim}, {kind}, length={self.length})"

    def mask(self) -> Mask:
        """What a query sees among the keys that `append` gives."""
        return Causal() if self.window is None else SlidingWindow(self.window - 1, 0)

    def append(self, key: Tensor, value: Tensor, padding: Tensor | None = None) -> CachedKeys:
        """Keep the tokens and give everything that they attend to.

        Args:
            key, value: (B, Hk, n, D) of the new tokens.
            padding: bool (B, n), True = never attend to this token.

        Raises:
            TypeError, ValueError: wrong dtype, shape or device; no room left in a static cache.
            RuntimeError: key or value would need a gradient.
        """
        count = self._check(key, value, padding)
        keep = self._stop - self._start
        if self.window is not None:
            keep = min(keep, self.window - 1)
        elif self._stop + count > self.capacity:
            room = self.capacity - self._stop
            fail(ValueError, "key", f"at most {room} more tokens for max_length = {self.capacity}", f"{count}")
        if padding is not None and self.padding is None:
            self.padding = torch.zeros(key.shape[0], self.capacity, dtype=torch.bool, device=self.key.device)
        if self._stop + count > self.capacity and keep + count > self.capacity:
            return self._overflow(key, value, padding, keep)
        if self._stop + count > self.capacity:
            for buffer in self._buffers():
                kept = buffer[..., self._stop - keep : self._stop, :]
                # a copy onto itself is undefined in torch
                buffer[..., :keep, :] = kept if self._stop >= 2 * keep else kept.clone()
            self._stop = keep
        for buffer, new in zip(self._buffers(), self._columns(key, value, padding), strict=True):
            buffer[..., self._stop : self._stop + count, :] = new
        self._start, self._stop = self._stop - keep, self._stop + count
        self.length += count
        held = slice(self._start, self._stop)
        return CachedKeys(
            self.key[:, :, held],
            self.value[:, :, held],
            self.length - count - keep,
            None if self.padding is None else self.padding[:, held],
        )

    def _overflow(self, key: Tensor, value: Tensor, padding: Tensor | None, keep: int) -> CachedKeys:
        """A step that is longer than a sliding cache: attend to everything, keep the last window."""
        assert self.window is not None
        joined = []
        for buffer, new in zip(self._buffers(), self._columns(key, value, padding), strict=True):
            whole = torch.cat((buffer[..., self._stop - keep : self._stop, :], new), dim=-2) if keep else new
            last = whole[..., whole.shape[-2] - self.window :, :]
            buffer[..., : self.window, :] = last
            joined.append(whole)
        self._start, self._stop = 0, self.window
        first, self.length = self.length - keep, self.length + key.shape[2]
        return CachedKeys(joined[0], joined[1], first, joined[2].squeeze(-1) if len(joined) > 2 else None)

    def _buffers(self) -> list[Tensor]:
        """Key, value and padding, tokens in the second to last dimension."""
        return [self.key, self.value, *([] if self.padding is None else [self.padding[..., None]])]

    def _columns(self, key: Tensor, value: Tensor, padding: Tensor | None) -> list[Tensor]:
        new = [key, value]
        if self.padding is not None:
            padding = self.padding.new_zeros(key.shape[0], key.shape[2]) if padding is None else padding
            new.append(padding[..., None])
        return new

    def _check(self, key: Tensor, value: Tensor, padding: Tensor | None) -> int:
        batch, heads, _, dim = self.key.shape
        for name, x in (("key", key), ("value", value)):
            check_floating(name, x)
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, dim):
                fail(ValueError, name, f"shape ({batch}, {heads}, n, {dim}) like the cache", x)
            if x.dtype != self.key.dtype or x.device != self.key.device:
                kind = TypeError if x.dtype != self.key.dtype else ValueError
                fail(kind, name, f"{self.key.dtype} on {self.key.device} like the cache", x)
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: expected no gradient, since a cache is written in place; decode under torch.no_grad()"
                )
        count = key.shape[2]
        if value.shape[2] != count:
            fail(ValueError, "value", f"{count} tokens like key", value)
        if padding is not None:
            if check_tensor("padding", padding).dtype != torch.bool:
                fail(TypeError, "padding", "bool, True = ignore", padding)
            check_shape("padding", padding, (batch, count))
        return count

    def reset(self) -> None:
        """Forget all tokens; the buffers stay."""
        self.length = self._start = self._stop = 0
        self.padding = None

    def reorder(self, index: Tensor) -> None:
        """Let sequence b go on from sequence index[b]: the step of a beam search.

        Args:
            index: (B,) integer.
        """
        check_shape("index", check_integer("index", index), (self.key.shape[0],))
        for buffer in self._buffers():
            held = buffer[..., self._start : self._stop, :]
            held.copy_(held.index_select(0, index.to(held.device).long()))


class MemoryCache:
    """The projected keys and values of a memory, which are the same at every step of a decoder.

    Projected anew when another tensor comes; a memory that is changed in place needs `reset`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the memory."""
        self._source: tuple[Tensor, Tensor] | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def holds(self, key: Tensor, value: Tensor) -> bool:
        return self._source is not None and self._source[0] is key and self._source[1] is value

    def fill(self, source: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError("memory: expected no gradient, since it is cached; decode under torch.no_grad()")
        # the sources are kept alive, so that no other tensor can take their identity
        self._source, self.key, self.value = source, key, value


class LayerCache(NamedTuple):
    """The caches of one use of a layer."""

    self_attn: KVCache
    memory: MemoryCache | None = None


class DecodingCache:
    """The caches of a stack, one per use of a layer: layers that share parameters do not share keys.

    Made by `TransformerDecoder.make_cache` and `TransformerEncoder.make_cache`.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers

    def __repr__(self) -> str:
        return f"DecodingCache({len(self.layers)} x {self.layers[0].self_attn})"

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """Tokens seen so far: the offset of the next ones for an absolute embedding."""
        return self.layers[0].self_attn.length

    def reset(self) -> None:
        """Forget all tokens and the memory."""
        for layer in self.layers:
            layer.self_attn.reset()
            if layer.memory is not None:
                layer.memory.reset()

    def reorder(self, index: Tensor) -> None:
        """`KVCache.reorder` of every layer.  The memory stays: reorder the one that is passed, if it differs."""
        for layer in self.layers:
            layer.self_attn.reorder(index)
