"""FIRE: a network of the distance, scaled by the query's position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.biases import Bias, add_dense
from fastattn.lowering import Draft
from fastattn.validation import check_device, check_floating, fail

# Pairs (i, j) that go through the network at a time: 128 MB for the activations of 32 units in float32.
PAIRS_AT_ONCE = 2**20
EPSILON = 1e-6


class FIRE(Bias):
    """Functional interpolation (Li et al., "Functional interpolation for relative positions improves long context
    transformers", ICLR 2024), with gradients for all its parameters::

        bias[h, i, j] = network(psi(|i - j|) / (psi(max(threshold, i)) + 1e-6))[h],   psi(x) = ln(|c x| + 1)

    It depends on i as well as on the distance, so it has no distance table: the network is evaluated at every pair, in
    blocks that are recomputed in the backward pass, and the kernel gets a dense bias.  Memory: Hq * Sq * Sk numbers
    (times B where offsets differ by sequence) for the bias, as many for its gradient.

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

    def _rows(self, position: Tensor, key_length: int) -> Tensor:
        """(B|1, rows, Sk, Hq) for query positions (B|1, rows)."""
        dtype, c = self.c.dtype, self.c.reshape(())
        position = position[..., None]
        size = (torch.arange(key_length, device=position.device) - position).abs()
        # written so that position 0 is never passed through the logarithm's pole
        top = torch.maximum(position.to(dtype), self.threshold.reshape(()).abs())
        scaled = torch.log1p((c * size).abs()) / (torch.log1p((c * top).abs()) + EPSILON)
        return self.network(scaled[..., None].to(dtype))

    def lower(self, draft: Draft) -> None:
        check_device("FIRE.c", self.c, draft.device)
        check_device("FIRE.threshold", self.threshold, draft.device)
        position = draft.positions()
        rows = max(1, PAIRS_AT_ONCE // max(1, draft.key_length * position.shape[0]))
        blocks = position.split(rows, dim=1)
        if len(blocks) > 1 and torch.is_grad_enabled():
            parts = [checkpoint(self._rows, block, draft.key_length, use_reentrant=False) for block in blocks]
        else:
            parts = [self._rows(block, draft.key_length) for block in blocks]
        dense = torch.cat(parts, dim=1).permute(0, 3, 1, 2)
        if dense.shape[1] != draft.heads:
            fail(ValueError, "FIRE.network", f"Hq = {draft.heads} outputs", f"{dense.shape[1]}")
        draft.note_dense("FIRE: its network at every pair", dense)
        add_dense(draft, dense.contiguous())
