"""The CPU kernels' own functions, against float64 over their whole range."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn import native
from fastattn.bench import ceilings

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))


def _exp2(x: torch.Tensor, coarse: bool) -> torch.Tensor:
    return torch.ops.fastattn.cpu_exp2(x, coarse)


@pytest.mark.parametrize(("coarse", "bound"), [(False, 1.8e-7), (True, 3.5e-6)], ids=["fine", "coarse"])
def test_exp2_within_its_bound(coarse: bool, bound: float) -> None:
    """Every exponent, and the fractions densely."""
    whole = torch.arange(-126, 128, dtype=torch.float64)
    fraction = torch.linspace(-0.5, 0.5, 4096, dtype=torch.float64)
    x = (whole[:, None] + fraction).flatten().clamp(-126, 127).float()
    exact = torch.exp2(x.double())
    error = ((_exp2(x, coarse).double() - exact) / exact).abs().max().item()
    assert bound / 20 < error < bound  # a bound far from the error would say nothing


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_exp2_at_its_ends(coarse: bool) -> None:
    x = torch.tensor([0.0, -math.inf, -127.0, -1e30, math.nan, 1.0, -1.0, 10.0]).repeat(2)
    y = _exp2(x, coarse)[:8]
    assert y[0] == 1
    assert (y[1:4] == 0).all()  # subnormal results are flushed
    assert y[4].isnan()
    if not coarse:
        torch.testing.assert_close(y[5:], torch.tensor([2.0, 0.5, 1024.0]))


def test_what_a_core_does_at_best() -> None:
    """No product on attention's tiles beats the multiply-adds it is made of, but for the noise of the machine."""
    for dtype, rates in ceilings.core(seconds=0.01).items():
        peak = rates.pop("peak_flops")
        assert peak > 1e8, dtype
        assert rates.pop("weights_per_s") > 1e6
        assert len(rates) == 4
        assert all(0 < rate < 1.5 * peak for rate in rates.values()), dtype
