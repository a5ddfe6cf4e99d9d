"""The `additive` suite: Bahdanau's attention against its formula in torch, which holds (B, H, Sq, Sk, D) in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastattn
from fastattn.bench.scenarios import Case, distances

ADDITIVE_SCENARIOS = ("additive", "additive-causal")
BACKENDS = {"fastattn": None, "fastattn-triton": "triton"}


@dataclass
class AdditiveInputs:
    """Query, key, value (B, H, S, D) and weight (H, D), which are the leaves, and the gradient of the output."""

    case: Case
    leaves: dict[str, Tensor]
    grad_out: Tensor

    @property
    def causal(self) -> bool:
        return self.case.scenario == "additive-causal"


def make_additive_inputs(case: Case, device: torch.device | str, seed: int = 0) -> AdditiveInputs:
    """Random normal inputs, drawn on the CPU; the weight is scaled so that scores are of order 1."""
    shape, generator = case.shape, torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, case.dtype)

    query, out = ((shape.batch, shape.heads, shape.query_length, dim) for dim in (shape.head_dim, shape.value_dim))
    key, value = ((shape.batch, shape.heads, shape.key_length, dim) for dim in (shape.head_dim, shape.value_dim))
    leaves = {
        "query": normal(*query),
        "key": normal(*key),
        "value": normal(*value),
        "weight": normal(shape.heads, shape.head_dim) * shape.head_dim**-0.5,
    }
    return AdditiveInputs(case, {name: leaf.requires_grad_() for name, leaf in leaves.items()}, normal(*out))


def prepare_additive(peer: str, inputs: AdditiveInputs) -> Callable[[], Tensor]:
    """A closure for one call.

    Raises:
        ValueError: a peer that has no additive attention.
    """
    leaves = list(inputs.leaves.values())
    if peer in BACKENDS:
        mask = fastattn.Causal() if inputs.causal else None
        return lambda: fastattn.additive_attention(*leaves, mask=mask, backend=BACKENDS[peer])
    if peer not in ("naive", "naive-compiled"):
        raise ValueError(f"{peer!r} has no additive attention")
    formula = _formula(inputs)
    if peer == "naive-compiled":
        formula = torch.compile(formula, dynamic=False)
    return lambda: formula(*leaves)


def _formula(inputs: AdditiveInputs) -> Callable[..., Tensor]:
    """The textbook formula as a function of the leaves, in the dtype they come in."""
    hidden = distances(inputs.case.shape, inputs.grad_out.device) > 0 if inputs.causal else None

    def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        t = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
        scores = (t @ weight[:, None, :, None]).squeeze(-1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ value

    return attend


def additive_oracle(inputs: AdditiveInputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by the formula in `dtype`, one batch and head at a time: they are independent."""
    whole = {name: leaf.detach().to(dtype) for name, leaf in inputs.leaves.items()}
    out = torch.empty_like(inputs.grad_out, dtype=dtype)
    grads = {name: torch.zeros_like(leaf) for name, leaf in whole.items()}
    for b in range(inputs.case.shape.batch):
        for h in range(inputs.case.shape.heads):
            at = {name: (h,) if name == "weight" else (b, h) for name in whole}
            part = [whole[name][at[name]][(None,) * len(at[name])].clone().requires_grad_() for name in whole]
            result = _formula(inputs)(*part)
            out[b, h] = result.detach()[0, 0]
            found = torch.autograd.grad(result, part, inputs.grad_out[b, h][None, None].to(dtype))
            for (name, place), grad in zip(at.items(), found, strict=True):
                grads[name][place] += grad.reshape(grads[name][place].shape)
    return out, grads
