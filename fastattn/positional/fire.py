"""FIRE: a network of the distance, scaled by the query's position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.biases import Bias, add_dense
from fastattn.lowering import Draft
from fastattn.validation import check_device, check_floating, fail

# Pairs (i, j) that go through the network at a time: 128 MB for the activations of 32 units in float32.
PAIRS_AT_ONCE = 2**20
# Into so many blocks at least the queries are cut where each has keys of its own.
BLOCKS = 8
EPSILON = 1e-6


class FIRE(Bias):
    """Functional interpolation (Li et al., "Functional interpolation for relative positions improves long context
    transformers", ICLR 2024), with gradients for all its parameters::

        bias[h, i, j] = network(psi(|i - j|) / (psi(max(threshold, i)) + 1e-6))[h],   psi(x) = ln(|c x| + 1)

    It depends on i as well as on the distance, so it has no distance table: the network is evaluated at every pair, in
    blocks of queries that are recomputed in the backward pass, without the keys that a causal or windowed mask hides
    from all of a block, and the kernel gets a dense bias.  Memory: Hq * Sq * Sk numbers (times B where offsets differ
    by sequence) for the bias, as many for its gradient.

    Args:
        network: maps (..., 1) in [0, 1] to (..., Hq).
        c: floating scalar tensor.
        threshold: floating scalar tensor, in positions.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; the network gives another number of heads.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], c: Tensor, threshold: Tensor) -> None:
        self.network = network
        self.c, self.threshold = check_floating("FIRE.c", c), check_floating("FIRE.threshold", threshold)
        for name, scalar in (("c", c), ("threshold", threshold)):
            if scalar.numel() != 1:
                fail(ValueError, f"FIRE.{name}", "one number", scalar)

    def __repr__(self) -> str:
        return f"FIRE({self.network})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return 1, self.network(self.c.new_zeros(1)).shape[-1], self.c.device

    def _dtype(self) -> torch.dtype:
        return self.c.dtype

    def _rows(self, position: Tensor, first: int, end: int) -> Tensor:
        """(B|1, Hq, rows, end - first) for query positions (B|1, rows) and the keys first ... end - 1."""
        dtype, c = self.c.dtype, self.c.reshape(())
        position = position[..., None]
        size = (torch.arange(first, end, device=position.device) - position).abs()
        # written so that position 0 is never passed through the logarithm's pole
        top = torch.maximum(position.to(dtype), self.threshold.reshape(()).abs())
        scaled = torch.log1p((c * size).abs()) / (torch.log1p((c * top).abs()) + EPSILON)
        return self.network(scaled[..., None].to(dtype)).permute(0, 3, 1, 2)

    def lower(self, draft: Draft) -> None:
        check_device("FIRE.c", self.c, draft.device)
        check_device("FIRE.threshold", self.threshold, draft.device)
        position, keys = draft.positions(), draft.key_length
        pairs = keys * position.shape[0]  # of a query
        rows = max(1, PAIRS_AT_ONCE // max(1, pairs))
        before, after = draft.window()
        # by arithmetic on plain numbers alone
        by_block = (before, after) != (-1, -1) and type(draft.query_offset) is int and not torch.compiler.is_compiling()
        if by_block:
            rows = min(rows, max(16, -(-draft.query_length // BLOCKS)))
        recomputed = torch.is_grad_enabled() and pairs * draft.query_length > PAIRS_AT_ONCE
        evaluate = partial(checkpoint, self._rows, use_reentrant=False) if recomputed else self._rows
        parts, start = [], 0
        for block in position.split(rows, dim=1):
            first, end = 0, keys
            if by_block:
                first, end = _keys_of_rows(start + draft.query_offset, block.shape[1], keys, before, after)  # type: ignore[operator]
            part = evaluate(block, first, end)
            parts.append(torch.nn.functional.pad(part, (first, keys - end)) if by_block else part)
            start += block.shape[1]
        dense = torch.cat(parts, dim=2)
        if dense.shape[1] != draft.heads:
            fail(ValueError, "FIRE.network", f"Hq = {draft.heads} outputs", f"{dense.shape[1]}")
        draft.note_dense("FIRE: its network at every pair", dense)
        add_dense(draft, dense.contiguous())


def _keys_of_rows(position: int, rows: int, keys: int, before: int, after: int) -> tuple[int, int]:
    """The range of keys that some of the queries at `position` and behind it see, with one key at least."""
    first = 0 if before < 0 else min(max(position - before, 0), max(keys - 1, 0))
    end = keys if after < 0 else min(max(position + rows + after, first + 1), keys)
    return first, end
