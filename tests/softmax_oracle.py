"""One masked softmax three ways: the plain formula in float64, the plain formula in the call's dtype, and fastattn.

`check` holds fastattn to twice the error that plain torch makes in the same dtype, plus the roundings stated there.
"""

from __future__ import annotations

import copy
import math

import torch
from features import FEATURES, Feature, Scene, Shape, Tensors, moved
from torch import Tensor

import fastattn
from fastattn.biases import Bias
from fastattn.masks import Mask

DEFAULT_SHAPE = Shape(query_length=9, key_length=21)


class SoftmaxCall:
    """Random scores for the named masks and biases at one shape, and the ways to run them."""

    def __init__(
        self,
        features: tuple[str, ...] = (),
        shape: Shape = DEFAULT_SHAPE,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        offset: int | Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        self.names, self.shape, self.dtype, self.seed, self.offset, self.scale = (
            features, shape, dtype, seed, offset, scale,
        )  # fmt: skip
        resolved = shape.key_length - shape.query_length if offset is None else offset
        scene = self.scene = Scene(shape, dtype, resolved, torch.Generator().manual_seed(seed))
        self.features: list[Feature] = [FEATURES[name](scene) for name in features]
        size = (shape.batch, shape.heads, shape.query_length, shape.key_length)
        self.leaves: Tensors = {"scores": 2 * scene.randn(*size)}
        for feature in self.features:
            self.leaves |= feature.leaves
        self.grad_out = scene.randn(*size)

    def __repr__(self) -> str:
        return (
            f"SoftmaxCall({self.names}, {self.shape}, {self.dtype}, seed={self.seed}, offset={self.offset}, "
            f"scale={self.scale})"
        )

    def keywords(self, leaves: Tensors) -> dict[str, object]:
        """The keyword arguments of `fastattn.masked_softmax`."""
        joined: dict[str, object] = {}
        for feature in self.features:
            for name, value in feature.public(leaves).items():
                have = joined.get(name)
                joined[name] = value if have is None else have & value if name == "mask" else have + value
        return joined | {"scale": self.scale, "query_offset": self.offset}

    def fresh(self, device: str = "cpu") -> Tensors:
        return {name: t.detach().to(device).requires_grad_() for name, t in self.leaves.items()}

    def fused(self, backend: str | None, device: str = "cpu") -> tuple[Tensor, Tensors]:
        """Output and gradients."""
        leaves = self.fresh(device)
        keywords = {name: moved(value, device) for name, value in self.keywords(leaves).items()}
        out = fastattn.masked_softmax(leaves["scores"], **keywords, backend=backend)
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out.to(out), allow_unused=True)
        return out.detach(), {n: _no_grad(g, leaves[n]) for n, g in zip(leaves, grads, strict=True)}

    def visible(self) -> Tensor:
        """(B, H, Sq, Sk) bool: True where the masks, -inf biases included, let a row see a column."""
        seen = torch.ones(self.leaves["scores"].shape, dtype=torch.bool)
        for feature in self.features:
            if feature.mask is not None:
                seen = seen & feature.mask
            if feature.bias is not None:
                seen = seen & (feature.bias(self.leaves) != -math.inf)
        return seen

    def naive(self, dtype: torch.dtype) -> tuple[Tensor, Tensors]:
        """The formula step by step in `dtype`, with autograd's gradients."""
        leaves = {
            name: t.detach().to(torch.float64 if dtype == torch.float64 else t.dtype).requires_grad_()
            for name, t in self.leaves.items()
        }
        seen = self.visible()
        empty = ~seen.any(-1, keepdim=True)
        scores = leaves["scores"] * self.scale
        for feature in self.features:
            if feature.bias is not None:
                scores = scores + feature.bias(leaves).to(dtype)
        # A row of -inf only would be NaN in softmax: such rows are filled with 0 and zeroed later.
        scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
        out = torch.softmax(scores, dim=-1).masked_fill(~seen, 0.0)
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out.to(dtype), allow_unused=True)
        return out.detach(), {n: _no_grad(g, leaves[n]) for n, g in zip(leaves, grads, strict=True)}

    def allowances(self, exact: Tensor) -> Tensors:
        """What each result may be off beside twice torch's own error, elementwise.

        A weight carries as many roundings as its score is large, in the dtype of the arithmetic; gradients are sums of
        terms that cancel, so every term counts at its size, and for half precision calls they start from weights that
        were rounded, or flushed to a subnormal, once.
        """
        wide = torch.finfo(self.scene.parameter_dtype)
        own = torch.finfo(self.dtype)
        top = max(1.0, (self.leaves["scores"].abs().max().item() * abs(self.scale)) if exact.numel() else 0.0)
        for feature in self.features:
            if feature.bias is not None:
                bias = feature.bias(self.leaves)
                finite = bias[bias.isfinite()]
                top += finite.abs().max().item() if finite.numel() else 0.0
        unit = 8 * wide.eps * (1 + top)
        grad = self.grad_out.double().abs()
        term = exact * (grad + (exact * grad).sum(-1, keepdim=True))
        score = (unit + (own.eps if self.dtype != self.scene.parameter_dtype else 0.0)) * term
        if self.dtype != self.scene.parameter_dtype:
            flushed = own.smallest_normal * own.eps / 2
            score = score + flushed * (grad + (exact * grad).sum(-1, keepdim=True) + exact * grad.sum(-1, keepdim=True))
        result = {"out": unit * exact, "scores": abs(self.scale) * score}
        for feature in self.features:
            if feature.bias is not None and feature.leaves:
                (name,) = feature.leaves
                leaf = self.leaves[name].detach().double().requires_grad_()
                total = feature.bias({**self.leaves, name: leaf})
                (mass,) = torch.autograd.grad(total, leaf, score.sum_to_size(total.shape), allow_unused=True)
                result[name] = mass.abs()
        return result


def _moved(value: object, device: str) -> object:
    """A mask or bias, with what it is joined of, whose tensors lie on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, (Mask, Bias)):
        there = copy.copy(value)
        vars(there).update({name: _moved(part, device) for name, part in vars(value).items()})
        return there
    return value


def _no_grad(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad.detach()


def check(call: SoftmaxCall, backend: str | None, device: str = "cpu") -> None:
    """fastattn's output and gradients against float64, within the budget; shapes, dtypes, exact zeros too."""
    exact_out, exact_grads = call.naive(torch.float64)
    plain_out, plain_grads = call.naive(call.dtype)
    out, grads = call.fused(backend, device)
    assert out.is_contiguous()
    masked = ~call.visible()
    for name, result in (("out", out), ("grad of scores", grads["scores"])):
        assert (result.cpu()[masked] == 0).all(), f"{name}: a masked place is not 0"
    allowances = call.allowances(exact_out)
    problems = []
    for name in ("out", *call.leaves):
        exact, plain, result = (
            (exact_out, plain_out, out) if name == "out" else (exact_grads[name], plain_grads[name], grads[name])
        )
        want = call.dtype if name == "out" else call.leaves[name].dtype
        assert result.shape == exact.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
        assert result.dtype == want, f"{name}: dtype {result.dtype}, expected {want}"
        if not exact.numel():
            continue
        own = torch.finfo(want)
        torch_error = (plain.double() - exact).abs().max() if call.dtype != torch.float64 else 0.0
        rounding = own.eps / 2 * exact.abs() + own.smallest_normal * own.eps
        error = (result.cpu().double() - exact).abs()
        budget = 2 * torch_error + rounding + allowances[name].reshape(exact.shape)
        if not (error <= budget).all():  # NaN is not within any budget
            worst = (error - budget).nan_to_num(math.inf).flatten().argmax()
            problems.append(
                f"{name}: error {error.flatten()[worst].item():.3e} over a budget of "
                f"{budget.flatten()[worst].item():.3e} where the value is {exact.flatten()[worst].item():.3e}"
            )
    assert not problems, "\n".join(problems)
