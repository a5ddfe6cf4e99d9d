"""Run with the site-packages folder of a clean environment: the installed wheel imports, computes and is right."""

import sys
from pathlib import Path

import torch

import fastattn

site = Path(sys.argv[1]).resolve()
assert site in Path(fastattn.__file__).resolve().parents, f"imported {fastattn.__file__}, not the wheel in {site}"

torch.manual_seed(0)
query, key, value = (torch.randn(2, 4, 65, 32, requires_grad=True) for _ in range(3))
slopes = fastattn.alibi_slopes(4).requires_grad_()
out = fastattn.attention(query, key, value, mask=fastattn.Causal(), bias=fastattn.ALiBi(slopes))
assert fastattn.last_call().backend == "cpu", (
    f"ran on {fastattn.last_call().backend}: the wheel's native library did not"
)
out.sum().backward()

distance = torch.arange(65)[None, :] - torch.arange(65)[:, None]
scores = query.double() @ key.double().mT / 32**0.5 - slopes.double()[:, None, None] * distance.abs()
exact = scores.masked_fill(distance > 0, float("-inf")).softmax(-1) @ value.double()
error = (out - exact).abs().max().item()
assert error < 1e-5, f"max abs error {error}"
(expected,) = torch.autograd.grad(exact.sum(), slopes)
assert torch.allclose(slopes.grad, expected.float(), rtol=1e-4, atol=1e-4)
print(
    f"fastattn {fastattn.__version__} from the wheel: max abs error {error:.1e}, backend {fastattn.last_call().backend}"
)
