"""The `module` suite: torch.nn.MultiheadAttention against fastattn's, as self-attention over (B, S, E)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastattn
import fastattn.nn
from fastattn.bench.scenarios import Case

MODULE_SCENARIOS = ("self", "padding", "weights", "padding-weights")


@dataclass
class ModuleInputs:
    """x (B, S, E) with its padding mask, and the stock module that holds the weights."""

    case: Case
    x: Tensor
    padding: Tensor | None  # (B, S) bool, True = padding
    stock: nn.MultiheadAttention
    grad_out: Tensor  # (B, S, E)

    @property
    def need_weights(self) -> bool:
        return self.case.scenario.endswith("weights")


def make_module_inputs(case: Case, device: torch.device | str, seed: int = 0) -> ModuleInputs:
    """Random inputs and one stock module; E = heads * head_dim, the first row of the batch is never padded."""
    shape = case.shape
    width = shape.heads * shape.head_dim
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.batch, shape.query_length, width, generator=generator).to(device, case.dtype)
    grad_out = torch.randn(shape.batch, shape.query_length, width, generator=generator).to(device, case.dtype)
    padding = None
    if case.scenario.startswith("padding"):
        lengths = torch.randint(shape.query_length // 4, shape.query_length + 1, (shape.batch,), generator=generator)
        lengths[0] = shape.query_length
        padding = (torch.arange(shape.query_length) >= lengths[:, None]).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stock = nn.MultiheadAttention(width, shape.heads, batch_first=True)
    return ModuleInputs(case, x.requires_grad_(), padding, stock.to(device, case.dtype), grad_out)


def prepare_module(peer: str, inputs: ModuleInputs) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A closure for one call, and the leaves it is differentiated by.

    Without gradients the module is in eval mode, so that torch takes its fused inference path where it can.
    """
    if peer == "nn-mha":
        module: nn.Module = inputs.stock
    elif peer == "fastattn-mha":
        module = fastattn.nn.MultiheadAttention.from_torch(inputs.stock)
    else:
        raise ValueError(f"{peer!r} is not a module")

    def forward() -> Tensor:
        module.train(torch.is_grad_enabled())
        return module(inputs.x, inputs.x, inputs.x, key_padding_mask=inputs.padding, need_weights=inputs.need_weights)[
            0
        ]

    return forward, {"x": inputs.x, **dict(inputs.stock.named_parameters())}


def module_flops(inputs: ModuleInputs, direction: str) -> float:
    """8·B·S·E² for the four projections and 4·B·S²·E for attention; backward twice the former, 2.5 times the latter.

    Padding and returned weights change nothing: every variant may use them as it can.
    """
    if direction == "both":
        return module_flops(inputs, "forward") + module_flops(inputs, "backward")
    batch, length, width = inputs.x.shape
    products, scores = 8.0 * batch * length * width**2, 4.0 * batch * length**2 * width
    return products + scores if direction == "forward" else 2.0 * products + 2.5 * scores


def module_oracle(inputs: ModuleInputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by the stock module's unfused path (need_weights=True) in `dtype`."""
    module = copy.deepcopy(inputs.stock).to(dtype).train()
    x = inputs.x.detach().to(dtype).requires_grad_()
    out = module(x, x, x, key_padding_mask=inputs.padding, need_weights=True)[0]
    leaves = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out.to(dtype))
    return out.detach(), dict(zip(leaves, gradients, strict=True))
