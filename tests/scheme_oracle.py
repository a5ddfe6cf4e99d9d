"""Positional schemes as they are published, against fastattn: output and every gradient, in any dtype.

For schemes with several parameters, or that depend on the contents, which `features.py` has no room for.  The formula
is given as plain torch; it is run in float64 for the truth and in the call's dtype for the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
ACTIVATIONS = ("query", "key", "value")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def attend(scores: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scores, masked) value; True = may attend, rows that see nothing give 0."""
    if mask is None:
        return scores.softmax(-1) @ value
    empty = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0).softmax(-1)
    return weights.masked_fill(~mask, 0.0) @ value


def _run(
    function: Callable[[Inputs], Tensor | tuple[Tensor, Tensor]], inputs: Inputs, dtype: torch.dtype, grad_out: Tensor,
    *, masses: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Output and gradients by name; with `masses` also, of each parameter, the sum of |dS * derivative of S| and, as
    "top", the largest score."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: x.to(dtype if name in ACTIVATIONS else wide).clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    learned = {name: x for name, x in leaves.items() if x.requires_grad}
    result = function(leaves)
    out, scores = result if isinstance(result, tuple) else (result, None)
    wanted = [*learned.values(), *([scores] if masses and scores is not None else [])]
    grads = torch.autograd.grad(out, wanted, grad_out.to(out.dtype), retain_graph=True, allow_unused=True)
    found = {"out": out.detach()}
    for name, x in learned.items():
        grad = grads[list(learned).index(name)]
        found[name] = torch.zeros_like(x) if grad is None else grad.detach()
        assert found[name].dtype == x.dtype, name
        assert found[name].shape == x.shape, name
    mass = {}
    if masses and scores is not None:
        size = grads[-1].abs()
        mass["top"] = scores.detach().abs().max()
        for name in learned:
            if name not in ACTIVATIONS:
                (moved,) = torch.autograd.grad(scores, learned[name], size, retain_graph=True, allow_unused=True)
                mass[name] = torch.zeros(()) if moved is None else moved.abs().max()
    return found, mass


def check_scheme(
    fast: Callable[[Inputs], Tensor],
    formula: Callable[[Inputs], tuple[Tensor, Tensor]],
    inputs: Inputs,
    dtype: torch.dtype,
) -> None:
    """`fast` gives the output, `formula` the output and the scores it comes from.

    Budget, as everywhere: twice torch's own error in the dtype, one rounding of what is stored, and for parameters a
    few roundings of the mass of what is summed.
    """
    torch.manual_seed(1)
    rounded = {n: x.to(dtype).double() if x.is_floating_point() and n in ACTIVATIONS else x for n, x in inputs.items()}
    rounded = {
        n: x if n in ACTIVATIONS or not x.is_floating_point() or dtype == torch.float64 else x.float().double()
        for n, x in rounded.items()
    }
    with torch.no_grad():
        grad_out = torch.randn_like(formula(rounded)[0]).to(dtype)
    exact, mass = _run(formula, rounded, torch.float64, grad_out, masses=True)
    plain, _ = _run(formula, rounded, dtype, grad_out)
    ours, _ = _run(fast, rounded, dtype, grad_out)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    problems = []
    for name, want in exact.items():
        got, theirs = ours[name].double(), plain[name].double()
        largest = want.abs().max().item() if want.numel() else 0.0
        torch_error = 0.0 if dtype == torch.float64 else (theirs - want).abs().max().item()
        budget = 2 * torch_error + torch.finfo(ours[name].dtype).eps / 2 * largest
        # a score s carries |s| roundings into its weight; in half precision the weights may be rounded once as well
        unit = 8 * eps * (1 + float(mass["top"]))
        unit += torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0
        budget += unit * max(largest, float(mass.get(name, 0.0)))
        error = (got - want).abs().max().item()
        if not error <= budget:
            problems.append(f"{name}: error {error:.3e} over a budget of {budget:.3e} (torch's own {torch_error:.3e})")
    assert not problems, "\n".join(problems)
