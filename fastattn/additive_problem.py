"""One call of additive attention as plain data: a `Problem` with another function of q and k in place of q.k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problem import FIELD_NAMES, Problem


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class AdditiveProblem:
    """Attention whose scores are scale * sum_d weight_d tanh(query_id + key_jd), with everything that follows them.

    `attention` holds operands, scale, masks, biases and dropout, meant as they are there, but no rotation, no softcap
    and no sink.
    """

    weight: Tensor  # (B|1, Hq, D), parameter dtype
    attention: Problem

    @property
    def device(self) -> torch.device:
        return self.attention.device

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.dtype

    def arguments(self) -> tuple[object, ...]:
        """The weight and then all fields of the attention problem, in order: the argument tuple of the operators."""
        return self.weight, *self.attention.arguments()

    def features(self) -> list[str]:
        """Names of the masks, biases and other optional stages this problem uses."""
        return self.attention.features()


def additive_problem(weight: Tensor, *fields: object) -> AdditiveProblem:
    """The inverse of `AdditiveProblem.arguments`."""
    attention = Problem(**dict(zip(FIELD_NAMES, fields, strict=True)))  # type: ignore[arg-type]
    return AdditiveProblem(weight=weight, attention=attention)


ADDITIVE_FIELDS: tuple[str, ...] = ("weight", *FIELD_NAMES)
# Fields a backend returns a gradient for, in the order of the backward operator's outputs.
ADDITIVE_GRADIENT_FIELDS: tuple[str, ...] = ("weight", "query", "key", "value", "slopes", "table", "dense_bias")
