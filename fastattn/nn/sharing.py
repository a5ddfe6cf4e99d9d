"""Parameters used in several places: layers by groups, and an output projection tied to an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.validation import check_index, describe, fail

__all__ = ["TiedLinear", "layer_groups"]


def layer_groups(num_layers: int, share_layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """The group of every layer; layers of a group are one module.

    Args:
        num_layers: L.
        share_layers: None for no sharing; a number of groups, of layers in a row, as even as they can be (Lan et al.,
            "ALBERT", 2020: 1 group); or the group of each layer, as in (0, 1, 0, 1), with every number from 0 on used.

    Raises:
        TypeError, ValueError: more groups than layers; a sequence of another length or with gaps.
    """
    check_index("num_layers", num_layers, least=0)
    if share_layers is None:
        return tuple(range(num_layers))
    if isinstance(share_layers, int):
        groups = check_index("share_layers", share_layers, least=1)
        if groups > num_layers:
            fail(ValueError, "share_layers", f"at most {num_layers} groups for as many layers", share_layers)
        return tuple(layer * groups // num_layers for layer in range(num_layers))
    if not isinstance(share_layers, Sequence):
        fail(TypeError, "share_layers", "None, an int, or a sequence of ints", describe(share_layers))
    groups_of = tuple(check_index("share_layers", group, least=0) for group in share_layers)
    if len(groups_of) != num_layers:
        fail(ValueError, "share_layers", f"a group for each of {num_layers} layers", describe(share_layers))
    if set(groups_of) != set(range(max(groups_of, default=-1) + 1)):
        fail(ValueError, "share_layers", "groups numbered from 0 without gaps", describe(share_layers))
    return groups_of


class TiedLinear(nn.Module):
    """The output projection of a language model, with the matrix of its embedding: x E^T + bias.

    One tensor does both (Press and Wolf, "Using the output embedding to improve language models", 2017; Vaswani et
    al., 2017): its gradients from both uses add up, and it has one entry in the state dict, the embedding's.  The
    embedding is looked up at every call, so it may be resized, replaced by a load with ``assign=True``, or moved.

    Args:
        embedding: nn.Embedding (V, E), a submodule of the same model.
        bias: whether there is a bias of its own, `bias` (V,), 0 at first.
    """

    def __init__(self, embedding: nn.Embedding, bias: bool = False) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Embedding):
            fail(TypeError, "embedding", "a torch.nn.Embedding", describe(embedding))
        self._tied = (embedding,)  # in a tuple: no submodule, so no second entry anywhere
        self.bias = nn.Parameter(torch.zeros_like(embedding.weight[:, 0])) if bias else None

    @property
    def weight(self) -> Tensor:
        return self._tied[0].weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., V) of x (..., E)."""
        return F.linear(x, self.weight, self.bias)
