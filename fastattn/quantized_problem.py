"""One call of attention on 8-bit operands as plain data: a `Problem` of them, and what multiplies their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problem import Problem

FLOAT8 = torch.float8_e4m3fn
# The result's: there is no 8-bit output.
OUT_DTYPE = torch.bfloat16


@dataclass(eq=False, slots=True, kw_only=True)
class QuantizedProblem:
    """Attention on operands of `FLOAT8`, each head of them times a number, with an output of `OUT_DTYPE`.

    `attention` holds the operands as they are stored, and the other fields, with their meaning for the numbers meant.
    """

    query_scale: Tensor | None  # (B|1, Hq) float32, dense; None = 1
    key_scale: Tensor | None  # (B|1, Hk)
    value_scale: Tensor | None  # (B|1, Hk)
    attention: Problem

    @property
    def device(self) -> torch.device:
        return self.attention.device

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    def arguments(self) -> tuple[object, ...]:
        """The scales and then all fields of the attention problem, in order: the argument tuple of the operator."""
        return self.query_scale, self.key_scale, self.value_scale, *self.attention.arguments()

    def features(self) -> list[str]:
        """Names of the masks and other optional stages this problem uses."""
        return self.attention.features()
