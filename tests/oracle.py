"""One attention call three ways: the plain formula in float64, the plain formula in the call's dtype, and fastattn.

`check` holds fastattn to twice the error that plain torch makes in the same dtype, plus the roundings stated in
`_allowance`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from features import FEATURES, SINKS, Feature, Scene, Shape, Tensors, moved
from torch import Tensor

import fastattn
from fastattn.philox import keep_mask

HALF = (torch.bfloat16, torch.float16)
DEFAULT_SHAPE = Shape()


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    grads: Tensors
    # In float64 only: for every result, sum |term| over the terms it is a sum of.  Cancellation makes the relative
    # error of a gradient unbounded; relative to this mass it is not.
    mass: Tensors = field(default_factory=dict)
    top: float = 0.0  # largest |score| among the visible


class Call:
    """Random inputs for the named features at one shape, and the ways to run them."""

    def __init__(
        self,
        features: tuple[str, ...] = (),
        shape: Shape = DEFAULT_SHAPE,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        offset: int | Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        with_lse: bool = True,
    ) -> None:
        s = self.shape = shape
        self.names, self.dtype, self.seed, self.offset, self.scale = features, dtype, seed, offset, scale
        self.dropout_p = dropout_p
        generator = torch.Generator().manual_seed(seed)
        resolved = s.key_length - s.query_length if offset is None else offset
        scene = self.scene = Scene(s, dtype, resolved, generator, self.factor)
        self.features: list[Feature] = [FEATURES[name](scene) for name in features]
        self.leaves: Tensors = {
            "query": scene.randn(s.batch, s.heads, s.query_length, s.head_dim),
            "key": scene.randn(s.batch, s.kv_heads, s.key_length, s.head_dim),
            "value": scene.randn(s.batch, s.kv_heads, s.key_length, s.value_dim),
        }
        for feature in self.features:
            self.leaves |= feature.leaves
        self.grad_out = scene.randn(s.batch, s.heads, s.query_length, s.value_dim)
        self.grad_lse = scene.randn(s.batch, s.heads, s.query_length, dtype=scene.parameter_dtype)
        if not with_lse:
            self.grad_lse.zero_()

    def __repr__(self) -> str:
        return (
            f"Call({self.names}, {self.shape}, {self.dtype}, seed={self.seed}, offset={self.offset}, "
            f"scale={self.scale}, dropout_p={self.dropout_p}, with_lse={bool(self.grad_lse.any())})"
        )

    # -- fastattn ------------------------------------------------------------------------------------------------

    def keywords(self, leaves: Tensors) -> dict[str, object]:
        """The keyword arguments of `fastattn.attention`."""
        joined: dict[str, object] = {}
        for feature in self.features:
            for name, value in feature.public(leaves).items():
                have = joined.get(name)
                joined[name] = value if have is None else have & value if name == "mask" else have + value
        return joined | {"scale": self.scale, "query_offset": self.offset, "dropout_p": self.dropout_p}

    def fused(self, backend: str | None, device: str = "cpu") -> Result:
        leaves = {name: t.detach().to(device).requires_grad_() for name, t in self.leaves.items()}
        torch.manual_seed(self.seed)
        out, lse = self.attend(leaves, backend)
        grads = torch.autograd.grad(
            [out, lse], list(leaves.values()), [self.grad_out.to(out), self.grad_lse.to(lse)], allow_unused=True
        )
        return Result(out.detach(), lse.detach(), dict(zip(leaves, map(_no_grad, grads, leaves.values()), strict=True)))

    def attend(self, leaves: Tensors, backend: str | None) -> tuple[Tensor, Tensor]:
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        keywords = {name: moved(option, str(query.device)) for name, option in self.keywords(leaves).items()}
        return fastattn.attention(query, key, value, **keywords, return_lse=True, backend=backend)

    def kept(self, device: str = "cpu") -> Tensor | None:
        """The dropout mask (B, Hq, Sq, Sk) that `fused` draws on the device, from the same seed."""
        if self.dropout_p == 0.0:
            return None
        torch.manual_seed(self.seed)
        operands = [self.leaves[name].to(device) for name in ("query", "key", "value")]
        problem = fastattn.functional.lower(*operands, dropout_p=0.5)
        s = self.shape
        kept = keep_mask(
            problem.dropout_seed.cpu(), self.dropout_p, torch.arange(s.batch * s.heads), torch.arange(s.query_length),
            range(s.key_length),
        )  # fmt: skip
        return kept.view(s.batch, s.heads, s.query_length, s.key_length)

    # -- the plain formula ---------------------------------------------------------------------------------------

    def visible(self, leaves: Tensors) -> Tensor:
        """(B, Hq, Sq, Sk) bool: True where the masks, -inf biases included, let a query see a key."""
        s = self.shape
        seen = torch.ones(s.batch, s.heads, s.query_length, s.key_length, dtype=torch.bool)
        for feature in self.features:
            if feature.mask is not None:
                seen = seen & feature.mask
            if feature.bias is not None:
                seen = seen & (feature.bias(leaves) != -math.inf)
        return seen

    @property
    def factor(self) -> float:
        return self.scale if self.scale is not None else max(self.shape.head_dim, 1) ** -0.5

    def products(self, leaves: Tensors, query: Tensor, key: Tensor) -> Tensor:
        """What stands before biases and masks, for one key head per query head."""
        return (query @ key.transpose(-1, -2)) * self.factor

    def product_masses(self, leaves: Tensors, score: Tensor, query: Tensor, key: Tensor) -> Tensors:
        """The masses of the gradients of what `products` is made of, from that of dS; key per query head."""
        return {
            "query": abs(self.factor) * score @ key.abs(),
            "key": abs(self.factor) * score.transpose(-1, -2) @ query.abs(),
        }

    def naive(self, dtype: torch.dtype, device: str = "cpu") -> Result:
        """The formula on the CPU, step by step in `dtype`, each step rounding to it, with autograd's gradients; with
        the dropout mask of a device."""
        s = self.shape
        leaves = {
            name: t.detach().to(torch.float64 if dtype == torch.float64 else t.dtype).requires_grad_()
            for name, t in self.leaves.items()
        }
        seen = self.visible(leaves)
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        for feature in self.features:
            if feature.rotate is not None:
                query, key = feature.rotate(leaves, query, key)
        group = s.heads // s.kv_heads if s.kv_heads else 1
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = self.products(leaves, query, key)
        for feature in self.features:
            if feature.softcap is not None:
                scores = torch.tanh(scores / feature.softcap) * feature.softcap
        for feature in self.features:
            if feature.bias is not None:
                scores = scores + feature.bias(leaves).to(dtype)
        # A row of -inf only would be NaN in softmax and its gradient: such rows are filled with 0 and zeroed later.
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
        sink = next((leaves[name].to(dtype) for name in SINKS if name in leaves), None)
        if sink is not None:
            column = (sink if sink.dim() == 2 else sink[None])[:, :, None, None].expand(s.batch, -1, s.query_length, 1)
            scores = torch.cat((scores.masked_fill(empty, -math.inf), column), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : s.key_length].masked_fill(~seen, 0.0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        lse = torch.logsumexp(scores.to(wide), dim=-1) if scores.shape[-1] else scores.to(wide).sum(-1)
        if sink is None:
            lse = lse.masked_fill(empty[..., 0], math.inf)
        kept = self.kept(device)
        dropped = weights if kept is None else torch.where(kept, weights / (1 - self.dropout_p), 0.0)
        out = dropped @ value
        grads = torch.autograd.grad(
            [out, lse], list(leaves.values()), [self.grad_out.to(dtype), self.grad_lse.to(wide)], allow_unused=True
        )
        result = Result(
            out.detach(), lse.detach(), dict(zip(leaves, map(_no_grad, grads, leaves.values()), strict=True))
        )
        if dtype == torch.float64:
            with torch.no_grad():
                result.top = scores.masked_fill(scores == -math.inf, 0.0).abs().max().item() if scores.numel() else 0.0
            self._masses(result, leaves, query, key, value, weights, dropped, sink)
        return result

    def _masses(
        self, result: Result, leaves: Tensors, query: Tensor, key: Tensor, value: Tensor, weights: Tensor,
        dropped: Tensor, sink: Tensor | None,
    ) -> None:  # fmt: skip
        s, grad_out, grad_lse = self.shape, self.grad_out.double().abs(), self.grad_lse.double().abs()[..., None]
        group = s.heads // s.kv_heads if s.kv_heads else 1
        with torch.no_grad():
            delta = (grad_out * (dropped @ value.abs())).sum(-1, keepdim=True) + grad_lse
            score = dropped * (grad_out @ value.abs().transpose(-1, -2)) + weights * delta

            def per_kv_head(x: Tensor) -> Tensor:
                return x.unflatten(1, (s.kv_heads, group)).sum(2) if s.kv_heads else x

            result.mass = {
                "out": dropped @ value.abs(),
                "lse": 1 + result.lse.abs().masked_fill(result.lse.isinf(), 0.0),
                "value": per_kv_head(dropped.transpose(-1, -2) @ grad_out),
                **self.product_masses(leaves, score, query, key),
            }
            result.mass["key"] = per_kv_head(result.mass["key"])
            for name in SINKS:
                if name in leaves:
                    share = torch.exp((sink if sink.dim() == 2 else sink[None])[:, :, None] - result.lse)
                    mass = share * delta[..., 0]
                    result.mass[name] = mass.sum(-1) if name == "sink_batch" else mass.sum((0, -1))
        for feature in self.features:
            if feature.bias is not None and feature.of_content:
                sizes = {name: t.detach().abs().requires_grad_() for name, t in leaves.items()}
                names = [*feature.leaves, "query", "key"]
                total = feature.bias(sizes)
                masses = torch.autograd.grad(
                    total, [sizes[n] for n in names], score.sum_to_size(total.shape), allow_unused=True
                )
                for name, mass in zip(names, masses, strict=True):
                    if mass is not None:
                        result.mass[name] = mass.abs() + result.mass.get(name, 0.0)
            elif feature.bias is not None:
                for name in feature.leaves:
                    total = feature.bias(leaves)
                    (mass,) = torch.autograd.grad(
                        total, leaves[name], score.sum_to_size(total.shape), allow_unused=True
                    )
                    result.mass[name] = mass.abs()
            elif feature.rotate is not None:
                for name in feature.leaves:  # through q and k, each turned by this table
                    through = result.mass["key" if "key_" in name else "query"].sum((0, 1))
                    result.mass[name] = torch.full_like(
                        leaves[name], 8.0 * through.max().item() if through.numel() else 0
                    )


def _no_grad(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad.detach()


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _allowance(call: Call, name: str, truth: Result, exact: Tensor, stored: torch.dtype) -> Tensor | float:
    """What is allowed beyond twice torch's own error.

    One rounding of the result to the dtype it is stored in, and the roundings of a few float32 (float64) operations
    on each of the terms it is a sum of: a score s carries |s| roundings into its weight.  A gradient of a half
    precision call may also see the output and the weights rounded once to that dtype; its lse, scores of rotated
    queries and keys that were rounded to it.  Weights below the smallest normal number may be flushed to 0.
    """
    wide = call.scene.parameter_dtype
    unit = 8 * torch.finfo(wide).eps * (1 + truth.top)
    if call.dtype in HALF and name not in ("out", "lse"):
        unit += torch.finfo(call.dtype).eps / 2
    rotated = name == "lse" and call.dtype in HALF and any(feature.rotate for feature in call.features)
    operands = torch.finfo(call.dtype).eps / 2 * truth.top if rotated else 0.0
    mass = truth.mass[name]
    # Activations: one number for the tensor.  Parameters: every entry is held to its own mass.
    bound = _largest(mass) if name in ("out", "lse", "query", "key", "value") else mass.reshape(exact.shape)
    # 1e4 terms of up to the flushed size in the arithmetic's own dtype, and half a step of the stored dtype near 0
    flushed = 1e4 * torch.finfo(wide).tiny + torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    return torch.finfo(stored).eps / 2 * exact.abs() + unit * bound + operands + flushed


def check(call: Call, backend: str | None, device: str = "cpu") -> None:
    """fastattn's output, lse and gradients against float64, within the budget; shapes, dtypes and finiteness too."""
    truth, plain = call.naive(torch.float64, device), call.naive(call.dtype, device)
    ours = call.fused(backend, device)
    everything = [("out", truth.out, plain.out, ours.out), ("lse", truth.lse, plain.lse, ours.lse)]
    everything += [(f"grad {n}", truth.grads[n], plain.grads[n], ours.grads[n]) for n in truth.grads]
    problems = []
    for label, exact, torch_result, result in everything:
        name, result = label.removeprefix("grad "), result.cpu()
        want = call.scene.parameter_dtype if label == "lse" else call.leaves.get(name, call.leaves["query"]).dtype
        assert result.shape == exact.shape, f"{label}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
        assert result.dtype == want, f"{label}: dtype {result.dtype}, expected {want}"
        finite = exact.isfinite()
        assert (result[~finite].double() == exact[~finite]).all(), f"{label}: expected infinities are not there"
        assert result[finite].isfinite().all(), f"{label}: NaN or infinity"
        zero = torch.zeros((), dtype=torch.float64)
        exact, result = torch.where(finite, exact, zero), torch.where(finite, result.double(), zero)
        torch_error = (
            _largest(torch.where(finite, torch_result.double() - exact, zero)) if call.dtype != torch.float64 else 0.0
        )
        error = (result - exact).abs()
        budget = 2 * torch_error + _allowance(call, name, truth, exact, want)
        if (error > budget).any():
            worst = (error - budget).flatten().argmax()
            limit = budget.flatten()[worst].item()
            problems.append(
                f"{label}: error {error.flatten()[worst].item():.3e} over a budget of {limit:.3e} "
                f"(torch's own error {torch_error:.3e}) where the value is {exact.flatten()[worst].item():.3e}"
            )
    assert not problems, "\n".join(problems)
