"""Attention on float8_e4m3fn operands with a scale for each head: inputs, float64 truth, and the formulas with
roundings by which errors are judged."""

from __future__ import annotations

import math

import torch
from features import SINKS, Shape, moved
from oracle import Call
from torch import Tensor

import fastattn

FLOAT8, BFLOAT16 = torch.float8_e4m3fn, torch.bfloat16


class Float8Call(Call):
    """A call with masks and sinks on 8-bit operands.  `per`: scales are "head" (H,), "batch" (B, H) or "none"."""

    def __init__(self, features: tuple[str, ...], shape: Shape, *, per: str = "batch", **options: object) -> None:
        super().__init__(features, shape, BFLOAT16, **options)
        self.operands = [self.leaves[name].to(FLOAT8) for name in ("query", "key", "value")]
        generator = torch.Generator().manual_seed(self.seed + 1)
        self.scales: dict[str, Tensor] = {}
        if per != "none":
            lead = (shape.batch,) if per == "batch" else ()
            for name, heads in (("query", shape.heads), ("key", shape.kv_heads), ("value", shape.kv_heads)):
                self.scales[name] = 2 ** (torch.rand(*lead, heads, generator=generator) * 2 - 1)

    def _scale(self, name: str, heads: int) -> Tensor:
        """(B|1, heads, 1, 1) float64, 1 where there is none."""
        scale = self.scales.get(name, torch.ones(heads)).double()
        return (scale if scale.dim() == 2 else scale[None])[:, :, None, None]

    def attend8(self, backend: str | None, device: str = "cpu") -> tuple[Tensor, Tensor]:
        keywords = {name: moved(option, device) for name, option in self.keywords(self.leaves).items()}
        scales = {f"{name}_scale": scale.to(device) for name, scale in self.scales.items()}
        operands = [x.to(device) for x in self.operands]
        with torch.no_grad():
            return fastattn.attention(*operands, **keywords, **scales, return_lse=True, backend=backend)

    def meant(self) -> list[Tensor]:
        """Query, key and value in float64, a key head for each query head."""
        s = self.shape
        heads = (s.heads, s.kv_heads, s.kv_heads)
        query, key, value = (
            x.double() * self._scale(name, n)
            for name, x, n in zip(("query", "key", "value"), self.operands, heads, strict=True)
        )
        group = s.heads // s.kv_heads
        return [query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)]

    def formula(self, rounding: str | None) -> tuple[Tensor, Tensor]:
        """Output and lse in float64.  "kernel": weights relative to the row's largest, times 256, are rounded to 8
        bits; "dequantized": operands are rounded to bfloat16 once, and scores and weights as the bfloat16 formula does.
        """

        def to(x: Tensor) -> Tensor:
            return x.to(BFLOAT16).double() if rounding == "dequantized" else x

        query, key, value = self.meant()
        if rounding == "dequantized":
            # the key's scale goes to the query
            scale = self._scale("key", self.shape.kv_heads).repeat_interleave(
                self.shape.heads // self.shape.kv_heads, 1
            )
            query, key, value = to(query * scale), key / scale, to(value)
        score = to(query @ key.transpose(-1, -2)) * self.factor
        seen = self.visible(self.leaves)
        score = to(score).masked_fill(~seen, -math.inf)
        sink = next((self.leaves[name].double() for name in SINKS if name in self.leaves), None)
        extra = torch.zeros(score.shape[:-1]).double() - math.inf
        if sink is not None:
            extra = extra.clone()
            extra[:] = (sink if sink.dim() == 2 else sink[None])[:, :, None]
        empty = ~seen.any(-1)
        largest = score.amax(-1).masked_fill(empty, 0.0)
        weight = torch.exp(score - largest[..., None])
        denominator = weight.sum(-1) + torch.exp(extra - largest)
        if rounding == "kernel":
            weight = (256 * weight).float().to(FLOAT8).double() / 256
        lse = (largest + denominator.log()).masked_fill(empty & (extra == -math.inf), math.inf)
        safe = denominator.masked_fill(denominator == 0, 1.0)[..., None]
        return to(weight / safe) @ value if rounding == "dequantized" else weight @ value / safe, lse


def check_float8(call: Float8Call, backend: str | None, device: str = "cpu", *, kernel: bool = True) -> None:
    """Output and lse against float64: twice the error of the formula with the same roundings, one rounding of the
    output, and those of float32 sums.  Tensor cores of sm_90 add 8-bit products with about 14 bits: 2^-13 of them."""
    exact, exact_lse = call.formula(None)
    plain, plain_lse = call.formula("kernel" if kernel else "dequantized")
    out, lse = (x.cpu() for x in call.attend8(backend, device))
    assert (out.dtype, lse.dtype) == (BFLOAT16, torch.float32)
    assert (out.shape, lse.shape) == (exact.shape, exact_lse.shape)
    query, key, value = call.meant()
    top = (abs(call.factor) * (query.abs() @ key.abs().transpose(-1, -2))).amax().item() if key.shape[2] else 0.0
    unit = (2.0**-13 if kernel and device != "cpu" else 8 * torch.finfo(torch.float32).eps) * (1 + top)
    error = (out.double() - exact).abs()
    mass = value.abs().amax().item() if value.numel() else 0.0
    budget = 2 * (plain - exact).abs().amax() + 2.0**-8 * exact.abs() + unit * mass if out.numel() else error
    assert (error <= budget).all(), f"error {error.max():.3e} of {exact.abs().max():.3e}, budget {budget.max():.3e}"
    finite = exact_lse.isfinite()
    assert torch.equal(lse[~finite].double(), exact_lse[~finite])
    if finite.any():
        slack = 2 * (plain_lse - exact_lse)[finite].abs().amax()
        assert (lse.double() - exact_lse)[finite].abs().max() <= slack + unit
