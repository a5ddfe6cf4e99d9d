"""Is it right: every variant is held against the naive formula in float64 before it is timed or reported.

Budget (the rule of the FlashAttention tests): twice the error that the naive formula makes in the case's own
precision, plus a few roundings of the result.  For the gradient of a parameter, a handful of sums over every score,
these are roundings of what is summed: terms cancel, and the formula's own error in two or six numbers may be lucky.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastattn.bench.additive import AdditiveInputs, additive_oracle
from fastattn.bench.modules import ModuleInputs, module_oracle
from fastattn.bench.peers import PEERS, AnyInputs, Prepared, prepare
from fastattn.bench.rows import RowInputs, row_oracle
from fastattn.bench.scenarios import SCENARIOS, Case, Inputs, dense_terms, naive_attention

BUDGET = 2.0
# Roundings that a result may have beside torch's, in units of the compute type: a few operations on the way, and for a
# sum of n terms taken one after the other sqrt(n) / 2, where torch's blocked products have fewer.
ROUNDINGS = 4
# Other people's kernels are timed up to this many budgets off: torch's bfloat16 backward is beyond one at 2048 keys.
PEER_SLACK = 4.0
ALL = slice(None)


class WrongResultError(Exception):
    """A variant computed something else than the formula."""


@dataclass(frozen=True)
class Check:
    """One compared tensor: `error` and `budget` are maxima of absolute differences."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


@dataclass(frozen=True)
class Expected:
    """Output and gradients by the formula in float64, with the budget of each."""

    values: dict[str, Tensor]
    budgets: dict[str, float]
    heads: slice = field(default_factory=lambda: ALL)
    kv_heads: slice = field(default_factory=lambda: ALL)


@dataclass
class Formula:
    """Output and gradients of the formula, and for parameters the size of what their largest gradient sums."""

    values: dict[str, Tensor]
    mass: dict[str, float] = field(default_factory=dict)


def _restricted(inputs: Inputs, dtype: torch.dtype, heads: slice, kv_heads: slice) -> Inputs:
    """The same case for some of its heads, in another dtype, with leaves of its own."""
    extras = {
        name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)
        for name, tensor in inputs.extras.items()
    }
    for name in SCENARIOS[inputs.case.scenario].parameters:
        extras[name].requires_grad_()

    def part(tensor: Tensor, which: slice) -> Tensor:
        return tensor.detach()[:, which].to(dtype)

    return Inputs(
        replace(inputs.case, dtype=dtype),
        part(inputs.query, heads).requires_grad_(),
        part(inputs.key, kv_heads).requires_grad_(),
        part(inputs.value, kv_heads).requires_grad_(),
        part(inputs.grad_out, heads),
        extras,
    )


def _of_heads(name: str, tensor: Tensor, inputs: Inputs, heads: slice, kv_heads: slice) -> Tensor:
    """The part of an output or gradient that belongs to the heads."""
    if name in ("out", "query"):
        return tensor[:, heads]
    if name in ("key", "value"):
        return tensor[:, kv_heads]
    index = [ALL] * tensor.dim()
    dim = SCENARIOS[inputs.case.scenario].parameters[name]
    if dim is not None:
        index[dim] = heads
    return tensor[tuple(index)]


def _formula(inputs: Inputs, dtype: torch.dtype, heads: slice, kv_heads: slice, gradients: bool) -> Formula:
    part = _restricted(inputs, dtype, heads, kv_heads)
    with torch.set_grad_enabled(gradients):
        mask, bias = dense_terms(part, heads)
        out = naive_attention(part, mask=mask, bias=bias, dropout=False, heads=heads)
    formula = Formula({"out": out.detach()})
    if not gradients:
        return formula
    leaves = part.leaves()
    learned = bias if bias is not None and bias.requires_grad else None
    wanted = [*leaves.values(), *([learned] if learned is not None else [])]
    found = torch.autograd.grad(out, wanted, part.grad_out, retain_graph=True)
    for name, gradient in zip(leaves, found, strict=False):
        own = gradient if name in ("query", "key", "value") else _of_heads(name, gradient, inputs, heads, kv_heads)
        formula.values[name] = own
    if learned is not None:
        # where derivatives have one sign in the parameter, as in every table, this is the sum of the terms' sizes;
        # where they have not, it is less, and the budget the stricter
        for name in SCENARIOS[inputs.case.scenario].parameters:
            (mass,) = torch.autograd.grad(
                learned, leaves[name], found[-1].abs(), retain_graph=True, allow_unused=True
            )  # fmt: skip
            if mass is not None:  # None: it is in the outputs beside the weights, not in the bias
                formula.mass[name] = mass.abs().max().item()
    return formula


def stand_in(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """The dtype whose error is measured for the budget of `dtype`, and what it is multiplied by.

    In float64 the oracle does not see its own error: float32's, scaled down, stands for it, once for each of the two.
    """
    if dtype == torch.float64:
        return torch.float32, 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return dtype, 1.0


def budgets(
    exact: dict[str, Tensor],
    same: dict[str, Tensor],
    case: Case,
    mass: dict[str, float] | None = None,
) -> dict[str, float]:
    """Allowed error of each tensor; `same` is the formula in `stand_in(case.dtype)`."""
    dtype, shape = case.dtype, case.shape
    _, scale = stand_in(dtype)
    if case.scenario in SCENARIOS:
        # scores that are sums of D + C products instead of D: rounding errors grow with the root of their number
        scale *= (1 + SCENARIOS[case.scenario].appended(shape) / max(1, shape.head_dim)) ** 0.5
    terms = max(shape.query_length * shape.heads // shape.kv_heads, shape.key_length)
    unit = max(ROUNDINGS, terms**0.5 / 2) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    found = {}
    for name, value in exact.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        error = (same[name].double() - value).abs().max().item() if value.numel() else 0.0
        summed = (mass or {}).get(name, largest)
        found[name] = BUDGET * scale * error + torch.finfo(dtype).eps * largest + unit * summed
    return found


def expect(inputs: AnyInputs, *, gradients: bool, kv_head: int | None = None) -> Expected:
    """What the case should give.  `kv_head` restricts the check to one KV head and its queries, over the whole batch:
    heads are independent, and the formula at full size would not fit into memory for long sequences."""
    dtype = inputs.case.dtype
    measured, _ = stand_in(dtype)
    if isinstance(inputs, (AdditiveInputs, ModuleInputs)):
        oracle = additive_oracle if isinstance(inputs, AdditiveInputs) else module_oracle
        exact, exact_gradients = oracle(inputs, torch.float64)  # type: ignore[operator]
        same, same_gradients = oracle(inputs, measured)  # type: ignore[operator]
        values = {"out": exact} | (exact_gradients if gradients else {})
        return Expected(values, budgets(values, {"out": same} | same_gradients, inputs.case))
    if isinstance(inputs, RowInputs):
        outs, exact_gradients = row_oracle(inputs, torch.float64)
        sames, same_gradients = row_oracle(inputs, measured)
        values = _named(outs) | (exact_gradients if gradients else {})
        return Expected(values, budgets(values, _named(sames) | same_gradients, inputs.case))
    heads = kv_heads = ALL
    # the gradient of a parameter that all heads share is a sum over all of them
    if kv_head is not None and None not in SCENARIOS[inputs.case.scenario].parameters.values():
        group = inputs.case.shape.heads // inputs.case.shape.kv_heads
        heads, kv_heads = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
    exact = _formula(inputs, torch.float64, heads, kv_heads, gradients)
    same = _formula(inputs, measured, heads, kv_heads, gradients)
    return Expected(exact.values, budgets(exact.values, same.values, inputs.case, exact.mass), heads, kv_heads)


def compare(inputs: AnyInputs, expected: Expected, values: dict[str, Tensor]) -> list[Check]:
    """Every tensor that a variant returned against the expected one of the same name."""
    checks = []
    for name, value in values.items():
        exact, got = expected.values[name], value.detach()
        if isinstance(inputs, ModuleInputs) and name == "out":
            got = inputs.real(got)
        if isinstance(inputs, Inputs):
            got = _of_heads(name, got, inputs, expected.heads, expected.kv_heads)
        error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
        checks.append(Check(name, error, expected.budgets[name]))
    return checks


def _named(out: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs by name: "out", or "out 0", "out 1", ..."""
    if isinstance(out, Tensor):
        return {"out": out.detach()}
    return {f"out {n}": one.detach() for n, one in enumerate(out)}


def evaluate(prepared: Prepared, *, gradients: bool) -> dict[str, Tensor]:
    """Output, and with `gradients` the gradient of every leaf, of one run."""
    with torch.set_grad_enabled(gradients):
        out = prepared.forward()
    values = _named(out)
    if gradients:
        values |= dict(zip(prepared.leaves, prepared.gradients(out), strict=True))
    return values


def check_dropout(peer: str, inputs: Inputs) -> list[Check]:
    """Dropout draws its own mask, so its mean is held: with V = 1 every row sums the kept, rescaled weights.

    Over n outputs the mean of 1 has a standard deviation far below 1/sqrt(n); 0.02 is generous, and a missing rescale
    (0.9 for p = 0.1) or a mask that is never drawn (no spread at all) is not.
    """
    ones = replace(inputs, value=torch.ones_like(inputs.value).requires_grad_())
    with torch.no_grad():
        out = prepare(peer, ones).forward().double()
    spread = 0.0 if out.std().item() > 1e-4 else 1.0
    return [Check("mean", abs(out.mean().item() - 1.0), 0.02), Check("drawn", spread, 0.5)]


def gate(
    peer: str,
    inputs: AnyInputs,
    prepared: Prepared,
    expected: Expected,
    *,
    gradients: bool,
) -> float:
    """Largest error of the variant as a multiple of its budget.

    fastattn is held to the budget itself, or to what its peer's `slack` makes of it, others to PEER_SLACK times it: how
    they round is their makers' choice, and the multiple stands in their rows.

    Raises:
        WrongResultError: some tensor is outside, NaN included.
    """
    if isinstance(inputs, Inputs) and SCENARIOS[inputs.case.scenario].dropout_p:
        checks = check_dropout(peer, inputs)
        if gradients:
            prepared.step()  # a peer that cannot differentiate says so here
    else:
        checks = compare(inputs, expected, evaluate(prepared, gradients=gradients))
    slack = PEERS[peer].slack if peer.startswith("fastattn") else PEER_SLACK
    # negated, so that NaN is outside
    outside = [c for c in checks if not c.error <= slack * c.budget]
    wrong = [f"{c.name} is off by {c.error:.2e}, budget {c.budget:.2e}" for c in outside]
    if wrong:
        raise WrongResultError("; ".join(wrong))
    return max((c.error / c.budget for c in checks if c.budget), default=0.0)
