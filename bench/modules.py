"""The `module` suites: torch.nn.MultiheadAttention and TransformerEncoder against fastattn's, over (B, S, E)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastattn
import fastattn.nn
from fastattn.bench.scenario import Case, Shape

ATTENTION_SCENARIOS = ("self", "padding", "weights", "padding-weights")
# with `skip`, training leaves padding out too
ENCODER_SCENARIOS = ("encoder", "encoder-padding", "encoder-padding-skip")
MODULE_SCENARIOS = ATTENTION_SCENARIOS + ENCODER_SCENARIOS
LAYERS = 2  # of an encoder, whose hidden layers are 4 E wide


@dataclass
class ModuleInputs:
    """x (B, S, E) with its padding mask, and the stock module that holds the weights."""

    case: Case
    x: Tensor
    padding: Tensor | None  # (B, S) bool, True = padding
    stock: nn.MultiheadAttention | nn.TransformerEncoder
    grad_out: Tensor  # (B, S, E)

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.is_encoder:
            return module(x, src_key_padding_mask=self.padding)
        need_weights = self.case.scenario.endswith("weights")
        return module(x, x, x, key_padding_mask=self.padding, need_weights=need_weights)[0]

    def leaves(self, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """What is differentiated by."""
        return {"x": x, **dict(module.named_parameters())}

    @property
    def is_encoder(self) -> bool:
        return self.case.scenario in ENCODER_SCENARIOS

    def real(self, out: Tensor) -> Tensor:
        """An encoder's output without what stands at padded positions: some leave these out, some compute them."""
        if not self.is_encoder or self.padding is None:
            return out
        return out.masked_fill(self.padding[..., None], 0)


def draw_padding(shape: Shape, generator: torch.Generator) -> Tensor:
    """(B, S) bool, True = padding: sequences of a quarter of the length up to all of it, the first of all of it."""
    lengths = torch.randint(shape.query_length // 4, shape.query_length + 1, (shape.batch,), generator=generator)
    lengths[0] = shape.query_length
    return torch.arange(shape.query_length) >= lengths[:, None]


def make_module_inputs(case: Case, device: torch.device | str, seed: int = 0) -> ModuleInputs:
    """Random inputs and one stock module; E = heads * head_dim, the first row of the batch is never padded."""
    shape = case.shape
    width = shape.heads * shape.head_dim
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.batch, shape.query_length, width, generator=generator).to(device, case.dtype)
    grad_out = torch.randn(shape.batch, shape.query_length, width, generator=generator).to(device, case.dtype)
    padding = draw_padding(shape, generator).to(device) if "padding" in case.scenario else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if case.scenario in ENCODER_SCENARIOS:
            layer = nn.TransformerEncoderLayer(width, shape.heads, 4 * width, dropout=0.0, batch_first=True)
            stock: nn.MultiheadAttention | nn.TransformerEncoder = nn.TransformerEncoder(layer, LAYERS)
        else:
            stock = nn.MultiheadAttention(width, shape.heads, batch_first=True)
    inputs = ModuleInputs(case, x.requires_grad_(), padding, stock.to(device, case.dtype), grad_out)
    inputs.grad_out = inputs.real(grad_out)
    return inputs


def prepare_module(peer: str, inputs: ModuleInputs) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """A closure for one call, and the leaves it is differentiated by.

    Without gradients the module is in eval mode, so that torch takes its fused inference path where it can.
    """
    if peer not in ("nn-mha", "fastattn-mha"):
        raise ValueError(f"{peer!r} is not a module")
    module: nn.Module = inputs.stock
    if peer == "fastattn-mha":
        if inputs.is_encoder:
            module = copy.deepcopy(inputs.stock)
            fastattn.replace_attention(module)
            module.skip_padding = True if inputs.case.scenario.endswith("skip") else None
        else:
            module = fastattn.nn.MultiheadAttention.from_torch(inputs.stock)

    def forward() -> Tensor:
        module.train(torch.is_grad_enabled())
        return inputs.call(module, inputs.x)

    return forward, inputs.leaves(module, inputs.x)


def module_flops(inputs: ModuleInputs, direction: str) -> float:
    """8·B·S·E² for the four projections and 4·B·S²·E for attention; backward twice the former, 2.5 times the latter.
    A layer of an encoder has 16·B·S·E² more.

    Padding and returned weights change nothing: every variant may use them as it can.
    """
    if direction == "both":
        return module_flops(inputs, "forward") + module_flops(inputs, "backward")
    batch, length, width = inputs.x.shape
    products, scores = 8.0 * batch * length * width**2, 4.0 * batch * length**2 * width
    if inputs.is_encoder:
        products, scores = 3 * LAYERS * products, LAYERS * scores
    return products + scores if direction == "forward" else 2.0 * products + 2.5 * scores


def module_oracle(inputs: ModuleInputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by the stock module's unfused path (training) in `dtype`."""
    module = copy.deepcopy(inputs.stock).to(dtype).train()
    x = inputs.x.detach().to(dtype).requires_grad_()
    if inputs.is_encoder:
        out = inputs.call(module, x)
    else:
        out = module(x, x, x, key_padding_mask=inputs.padding, need_weights=True)[0]
    leaves = inputs.leaves(module, x)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out.to(dtype))
    return inputs.real(out.detach()), dict(zip(leaves, gradients, strict=True))
