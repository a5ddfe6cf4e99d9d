"""The `softmax` and `rotary` suites: what is limited by memory, as GB/s of the bytes that must be moved.

Bytes, with |X| the size of a tensor in memory and v the share of the scores that the mask lets through:

    softmax forward    v |S| + |S| + |mask| + |bias|     visible scores are read once, every result is written once
    softmax backward   2 v |S| + |S| + |bias|            result and gradient read, gradient of scores (and bias) written
    rotary, each way   2 (|Q| + |K|) + |cos| + |sin|

A variant that makes more passes moves more and shows fewer of these.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastattn
from fastattn.bench.scenarios import Case, distances, rotary_tables, rotate

SOFTMAX_SCENARIOS = ("softmax", "softmax-causal", "softmax-documents", "softmax-mask", "softmax-bias")
DOCUMENTS = 4  # of one length in a row
ROTARY_SCENARIOS = ("rotary-half", "rotary-interleaved")
ROW_SCENARIOS = (*SOFTMAX_SCENARIOS, *ROTARY_SCENARIOS)
BACKENDS = {"fastattn": None, "fastattn-cuda": "cuda", "fastattn-triton": "triton"}

Outputs = tuple[Tensor, ...]


@dataclass
class RowInputs:
    """Operands of one case, which are also its leaves, with the tensors it needs beside them."""

    case: Case
    leaves: dict[str, Tensor]
    grad_out: Outputs
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def visible(self) -> float:
        """Share of the scores that the mask lets through: half for causal, as everyone counts; 1 for arbitrary ones,
        whose scores lie beside visible ones in memory."""
        return {"softmax-causal": 0.5, "softmax-documents": 1 / DOCUMENTS}.get(self.case.scenario, 1.0)


def make_row_inputs(case: Case, device: torch.device | str, seed: int = 0) -> RowInputs:
    """Random normal inputs, drawn on the CPU."""
    shape = case.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, case.dtype)

    if case.scenario in ROTARY_SCENARIOS:
        sizes = [(shape.batch, shape.query_length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads)]
        query, key, *grads = [normal(*size).transpose(1, 2) for size in (*sizes, *sizes)]
        tables = {name: table.to(device) for name, table in rotary_tables(shape, generator).items()}
        leaves = {"query": query.requires_grad_(), "key": key.requires_grad_()}
        return RowInputs(case, leaves, tuple(grads), tables)
    size = (shape.batch, shape.heads, shape.query_length, shape.key_length)
    inputs = RowInputs(case, {"scores": normal(*size).requires_grad_()}, (normal(*size),))
    if case.scenario == "softmax-causal":
        inputs.extras["mask"] = distances(shape, torch.device(device)) <= 0
    elif case.scenario == "softmax-documents":
        ids = torch.arange(shape.key_length, device=device) * DOCUMENTS // shape.key_length
        inputs.extras |= {"ids": ids, "mask": ids[shape.offset :, None] == ids}
    elif case.scenario == "softmax-mask":
        kept = torch.rand(shape.batch, 1, shape.query_length, shape.key_length, generator=generator) < 0.8
        inputs.extras["mask"] = kept.to(device)
    elif case.scenario == "softmax-bias":
        inputs.leaves["bias"] = normal(1, *size[1:]).requires_grad_()
    return inputs


def prepare_rows(peer: str, inputs: RowInputs) -> Callable[[], Outputs]:
    """A closure for one call.

    Raises:
        ValueError: a peer that has neither a softmax nor a rotation.
    """
    if peer in BACKENDS:
        return _fastattn(inputs, BACKENDS[peer])
    if peer == "liger":
        return _liger(inputs)
    if peer not in ("naive", "naive-compiled"):
        raise ValueError(f"{peer!r} has neither a masked softmax nor a rotation")
    formula = _formula(inputs)
    names = list(inputs.leaves)
    if peer == "naive-compiled":
        formula = torch.compile(formula, dynamic=False)
    return lambda: formula(*[inputs.leaves[name] for name in names])


def _fastattn(inputs: RowInputs, backend: str | None) -> Callable[[], Outputs]:
    leaves, extras, scenario = inputs.leaves, inputs.extras, inputs.case.scenario
    if scenario in ROTARY_SCENARIOS:
        pairing = scenario == "rotary-interleaved"
        return lambda: fastattn.apply_rotary(
            leaves["query"], leaves["key"], extras["cos"], extras["sin"], interleaved=pairing, backend=backend
        )
    mask: fastattn.Mask | None = None
    if scenario == "softmax-causal":
        mask = fastattn.Causal()
    elif scenario == "softmax-documents":
        mask = fastattn.Documents(extras["ids"][inputs.case.shape.offset :], extras["ids"])
    elif scenario == "softmax-mask":
        mask = fastattn.BoolMask(extras["mask"])
    bias = fastattn.DenseBias(leaves["bias"]) if "bias" in leaves else None
    return lambda: (fastattn.masked_softmax(leaves["scores"], mask=mask, bias=bias, backend=backend),)


def _liger(inputs: RowInputs) -> Callable[[], Outputs]:
    """Liger's Triton kernel.  It turns what it is given, so every call gets copies, whose time is in its own."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("liger_kernel is not installed")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    if inputs.case.scenario != "rotary-half":
        raise ValueError("liger_rotary_pos_emb turns the halves of a head, not neighbours")
    # (1, S, D), each half the same
    cos, sin = (torch.cat((inputs.extras[name],) * 2, -1)[None] for name in ("cos", "sin"))
    return lambda: liger_rotary_pos_emb(inputs.leaves["query"].clone(), inputs.leaves["key"].clone(), cos, sin)


def _formula(inputs: RowInputs) -> Callable[..., Outputs]:
    """The textbook formula as a function of the leaves, in the dtype they come in."""
    extras = inputs.extras
    if inputs.case.scenario in ROTARY_SCENARIOS:
        interleaved = inputs.case.scenario == "rotary-interleaved"

        def turn(query: Tensor, key: Tensor) -> Outputs:
            cos, sin = (extras[name].to(torch.promote_types(torch.float32, query.dtype)) for name in ("cos", "sin"))
            return tuple(rotate(x, cos, sin, interleaved).to(x.dtype) for x in (query, key))

        return turn
    hidden = None if "mask" not in extras else ~extras["mask"]

    def softmax(scores: Tensor, bias: Tensor | None = None) -> Outputs:
        if bias is not None:
            scores = scores + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1),)

    return softmax


def row_oracle(inputs: RowInputs, dtype: torch.dtype) -> tuple[Outputs, dict[str, Tensor]]:
    """Outputs and gradients by the formula in `dtype`."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in inputs.leaves.items()}
    outs = _formula(inputs)(*leaves.values())
    grads = torch.autograd.grad(outs, list(leaves.values()), [grad.to(dtype) for grad in inputs.grad_out])
    return tuple(out.detach() for out in outs), dict(zip(leaves, grads, strict=True))


def moved_bytes(inputs: RowInputs, direction: str) -> float:
    """The bytes of the table above, for "forward", "backward" or "both"."""
    if direction == "both":
        return moved_bytes(inputs, "forward") + moved_bytes(inputs, "backward")
    size = {name: tensor.nbytes for name, tensor in (inputs.leaves | inputs.extras).items()}
    if inputs.case.scenario in ROTARY_SCENARIOS:
        return 2 * (size["query"] + size["key"]) + size["cos"] + size["sin"]
    bias = size.get("bias", 0)
    if direction == "backward":
        return (2 * inputs.visible + 1) * size["scores"] + bias
    # a causal mask is arithmetic, and ids are few: nobody has to read a mask
    mask = size["mask"] if inputs.case.scenario == "softmax-mask" else 0
    return (inputs.visible + 1) * size["scores"] + mask + bias
