"""For parameters that a model's conversion to half precision would ruin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="FullPrecision")


class FullPrecision(nn.Module):
    """A module that moves with its model, but stays in float32 (or float64) when the model becomes half precision."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = result.dtype in (torch.bfloat16, torch.float16)
            # from the tensor itself: what went through half precision is no longer what it was
            return tensor.to(result.device) if half else result

        return super()._apply(moved, recurse)
