"""One call of additive attention three ways: everything of `oracle.Call`, with other scores."""

from __future__ import annotations

from features import Tensors
from oracle import Call
from torch import Tensor

import fastattn


class AdditiveCall(Call):
    """Random inputs as those of `Call`, and a weight (H, D)."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.leaves["weight"] = self.scene.randn(self.shape.heads, self.shape.head_dim)

    def attend(self, leaves: Tensors, backend: str | None) -> tuple[Tensor, Tensor]:
        operands = [leaves[name] for name in ("query", "key", "value", "weight")]
        keywords = self.keywords(leaves) | {"scale": self.factor}
        return fastattn.additive_attention(*operands, **keywords, return_lse=True, backend=backend)

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale

    def products(self, leaves: Tensors, query: Tensor, key: Tensor) -> Tensor:
        t = (query[..., :, None, :] + key[..., None, :, :]).tanh()
        return (t * leaves["weight"][:, None, None]).sum(-1) * self.factor

    def product_masses(self, leaves: Tensors, score: Tensor, query: Tensor, key: Tensor) -> Tensors:
        t = (query[..., :, None, :] + key[..., None, :, :]).tanh()
        through = score[..., None] * (1 - t * t) * leaves["weight"][:, None, None].abs() * abs(self.factor)
        weight = abs(self.factor) * (score[..., None] * t.abs()).sum((0, 2, 3))
        return {"query": through.sum(3), "key": through.sum(2), "weight": weight}
