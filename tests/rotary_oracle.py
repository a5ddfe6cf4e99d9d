"""The rotation by its definition, as a complex product in float64, and what `apply_rotary` may differ from it by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastattn


@dataclass(frozen=True)
class RotaryShape:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    length: int = 7
    dim: int = 16
    width: int = 16  # R: how many leading dimensions rotate
    rows: int = 40  # P


class RotaryCall:
    """Random operands, tables of amplitude 1.3 and positions at one shape."""

    def __init__(
        self,
        shape: RotaryShape,
        dtype: torch.dtype = torch.float32,
        *,
        interleaved: bool = False,
        positions: str = "none",
        batched: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        s = self.shape = shape
        self.dtype, self.interleaved = dtype, interleaved
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angle = 3 * randn(*([s.batch] if batched else []), s.rows, s.width // 2)
        self.cos, self.sin = (1.3 * angle.cos()).to(wide), (1.3 * angle.sin()).to(wide)
        sizes = [(s.batch, heads, s.length, s.dim) for heads in (s.heads, s.kv_heads)]
        self.query, self.key = [randn(*size).to(dtype) for size in sizes]
        self.grads = [randn(*size).to(dtype) for size in sizes]
        drawn = torch.randint(0, s.rows, (s.batch, s.length), generator=generator)
        self.positions = {
            "none": None,
            "shared": drawn[0].int() if s.batch else drawn.new_zeros(s.length),
            "each": drawn,
        }[positions]

    def run(self, backend: str | None, device: str = "cpu", **changes: object) -> tuple[Tensor, Tensor]:
        given = {"query": self.query, "key": self.key, "cos": self.cos, "sin": self.sin} | changes
        operands = [given.pop(name).to(device) for name in ("query", "key", "cos", "sin")]  # type: ignore[attr-defined]
        positions = given.pop("positions", self.positions)
        positions = positions.to(device) if isinstance(positions, Tensor) else None
        return fastattn.apply_rotary(
            *operands, positions=positions, interleaved=self.interleaved, backend=backend, **given
        )

    def exact(self, x: Tensor, *, conjugate: bool = False) -> Tensor:
        """x (B, H, S, D) rotated in float64."""
        s, half = self.shape, self.shape.width // 2
        factor = torch.complex(self.cos.double(), self.sin.double())
        factor = factor.expand(s.batch, -1, -1) if factor.dim() == 2 else factor
        rows = torch.arange(s.length) if self.positions is None else self.positions.long()
        rows = rows.expand(s.batch, -1)
        factor = (
            torch.stack([factor[b, rows[b]] for b in range(s.batch)])[:, None]
            if s.batch
            else factor[:, None, : s.length]
        )
        factor = factor.conj() if conjugate else factor
        turned, rest = x.double()[..., : s.width], x.double()[..., s.width :]
        pairs = turned.unflatten(-1, (half, 2) if self.interleaved else (2, half))
        pairs = pairs if self.interleaved else pairs.transpose(-1, -2)
        spun = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * factor)
        spun = spun if self.interleaved else spun.transpose(-1, -2)
        return torch.cat((spun.flatten(-2), rest), dim=-1)


def check_rotation(call: RotaryCall, backend: str | None, device: str = "cpu") -> None:
    """Rotated operands and their gradients: three roundings of the arithmetic and one of the result, each."""
    leaves = [x.detach().to(device).requires_grad_() for x in (call.query, call.key)]
    out = call.run(backend, device, query=leaves[0], key=leaves[1])
    grads = torch.autograd.grad(out, leaves, [g.to(device) for g in call.grads])
    wide = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32)
    own = torch.finfo(call.dtype)
    for name, result, source, conjugate in (
        ("query", out[0], call.query, False), ("key", out[1], call.key, False),
        ("gradient of query", grads[0], call.grads[0], True), ("gradient of key", grads[1], call.grads[1], True),
    ):  # fmt: skip
        exact = call.exact(source, conjugate=conjugate)
        assert result.shape == exact.shape and result.dtype == call.dtype, name
        largest = source.double().abs().max() if source.numel() else 0.0
        budget = own.eps / 2 * exact.abs() + 3 * wide.eps * 1.3 * 2 * largest + own.smallest_normal * own.eps
        error = (result.detach().cpu().double() - exact).abs()
        assert (error <= budget).all(), f"{name}: error {error.max()}"
