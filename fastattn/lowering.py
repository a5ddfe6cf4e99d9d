"""The mutable draft of a `Problem` that mask, bias and rotary objects write themselves into."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn.problem import Problem
from fastattn.validation import is_readable


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
    # What the kernel will get, for objects to replace; None where a call has only scores.  `scale` multiplies their
    # product, `rotates` says whether they will be rotated after all biases are lowered, `caps` whether a softcap stands
    # between product and biases.
    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    rotates: bool = False
    caps: bool = False
    # Whether the kernels that may run read row and column tables.
    takes_tables: bool = True
    # Query and key as they came, for biases that depend on the contents.
    operands: tuple[Tensor, Tensor] | None = None
    # What was done to fit the call to the kernels, and in which memory: shown by `explain`.
    notes: list[str] = field(default_factory=list)

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.query_length, self.key_length)

    def reach(self) -> tuple[int, int]:
        """(left, right) >= 0 such that the masks lowered so far show no pair at a distance beyond [-left, right].

        Offsets in a tensor whose values cannot be read for free are taken to be in [0, Sk].
        """
        offset = self.query_offset
        if not isinstance(offset, Tensor):
            least = most = offset
        elif is_readable(offset) and offset.numel():
            least, most = int(offset.min()), int(offset.max())
        else:
            least, most = 0, self.key_length
        left, right = max(0, most + self.query_length - 1), max(0, self.key_length - 1 - least)
        before, after = self.window()
        return left if before < 0 else min(left, before), right if after < 0 else min(right, after)

    def window(self) -> tuple[int, int]:
        """`window_left` and `window_right` of the masks lowered so far, -1 = unbounded."""
        return self.fields.get("window_left", -1), self.fields.get("window_right", -1)  # type: ignore[return-value]

    def positions(self) -> Tensor:
        """(B|1, Sq) int64: the position of every query among the keys."""
        rows = torch.arange(self.query_length, device=self.device)
        offset = self.query_offset
        return rows[None] + (offset[:, None] if isinstance(offset, Tensor) else offset)

    def note_dense(self, what: str, dense: Tensor) -> None:
        """A note for `explain` that `what` became a dense tensor of the scores' size."""
        megabytes = dense.numel() * dense.element_size() / 1e6
        self.notes.append(f"{what}, as a dense bias {tuple(dense.shape)} of {megabytes:.3g} MB")

    def note_tables(self, what: str, rows: Tensor | None, cols: Tensor | None) -> None:
        """A note for `explain` that `what` became tables of the queries' and of the keys' own."""
        parts = [(side, x) for side, x in (("row", rows), ("column", cols)) if x is not None]
        megabytes = sum(x.numel() * x.element_size() for _, x in parts) / 1e6
        names = " and ".join(f"a {side} table {tuple(x.shape)}" for side, x in parts)
        self.notes.append(f"{what} as {names} of {megabytes:.3g} MB")

    def append_columns(self, query_columns: Tensor, key_columns: Tensor) -> None:
        """Add scale * query_columns . key_columns to the scores, by appending them to the head dimension.

        Shapes (B|1, Hq|1, Sq, C) and (B|1, Hk|1, Sk, C).  Call after the operands were checked to be there.  A head
        dimension that was a multiple of 8, as tensor cores want it, is filled up with zeros to the next one.
        """
        assert self.query is not None
        assert self.key is not None
        width = self.query.shape[-1]
        filling = -(width + query_columns.shape[-1]) % 8 if width % 8 == 0 else 0
        joined = []
        for x, columns in ((self.query, query_columns), (self.key, key_columns)):
            columns = torch.nn.functional.pad(columns, (0, filling)) if filling else columns
            shape = (*x.shape[:3], columns.shape[-1])
            joined.append(torch.cat((x, columns.to(x.dtype).expand(shape)), dim=-1))
        self.query, self.key = joined


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
