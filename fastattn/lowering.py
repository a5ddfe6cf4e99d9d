"""The mutable draft of a `Problem` that mask, bias and rotary objects write themselves into."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.problem import Problem


@dataclass(slots=True)
class Draft:
    """The call's sizes, which objects check themselves against, and the `Problem` fields they have set so far."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    device: torch.device
    parameter_dtype: torch.dtype
    query_offset: int | Tensor
    fields: dict[str, object] = field(default_factory=dict)

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.query_length, self.key_length)


def standalone(
    batch: int, heads: int, query_length: int, key_length: int, device: torch.device, query_offset: int | Tensor | None
) -> Draft:
    """The draft `materialize` uses: sizes from the caller, nothing else in the call."""
    offset = key_length - query_length if query_offset is None else query_offset
    return Draft(batch, heads, query_length, key_length, 0, device, torch.float32, offset)


def empty_problem(draft: Draft) -> Problem:
    """A problem of the draft's sizes with no content, to evaluate masks and biases alone."""
    offset = draft.query_offset
    return Problem(
        query=torch.empty(draft.batch, draft.heads, draft.query_length, 0, device=draft.device),
        key=torch.empty(draft.batch, draft.heads, draft.key_length, 0, device=draft.device),
        value=torch.empty(draft.batch, draft.heads, draft.key_length, 0, device=draft.device),
        scale=1.0,
        query_offset=0 if isinstance(offset, Tensor) else offset,
        query_offsets=offset if isinstance(offset, Tensor) else None,
        **draft.fields,  # type: ignore[arg-type]
    )
