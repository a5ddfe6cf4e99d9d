"""Tests that Triton's interpreter, the CUDA simulator and a GPU share: each takes a backend's name and a device."""

from __future__ import annotations

import dataclasses
import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from features import Shape
from oracle import Call
from rotary_oracle import RotaryCall, RotaryShape
from softmax_oracle import SoftmaxCall
from torch import Tensor

import fastattn


def _gradients(backend: str, leaves: list[Tensor], grad: Tensor, **keywords: object) -> list[Tensor]:
    """Output, lse and gradients of query, key, value and further leaves."""
    out, lse = fastattn.attention(*leaves[:3], **keywords, return_lse=True, backend=backend)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]


def _assert_same(ours: list[Tensor], want: list[Tensor]) -> None:
    for n, (mine, other) in enumerate(zip(ours, want, strict=True)):
        assert mine.isfinite().all(), f"result {n}"
        assert torch.equal(mine, other), f"result {n}"


def reads_and_writes_stay_inside(backend: str, device: str, dtype: torch.dtype) -> None:
    """Operands are slices of larger tensors whose surroundings are NaN; nothing of it may reach the result."""
    torch.manual_seed(0)

    def guarded(*shape: int) -> Tensor:
        whole = torch.full([n + 6 for n in shape[:-1]] + [shape[-1] + 8], math.nan, dtype=dtype, device=device)
        inner = whole[tuple(slice(3, 3 + n) for n in shape[:-1])][..., 4 : 4 + shape[-1]]
        inner.copy_(torch.randn(shape))
        return inner

    operands = [guarded(2, 2, 33, 24), guarded(2, 2, 41, 24), guarded(2, 2, 41, 24), guarded(1, 2, 33, 41)]
    grad = guarded(2, 2, 33, 24)
    results = []
    for tensors in (operands, [x.contiguous() for x in operands]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        bias = fastattn.DenseBias(leaves[3])
        results.append(_gradients(backend, leaves, grad, bias=bias, mask=fastattn.Causal()))
    _assert_same(*results)


def strided_views(backend: str, device: str, dtype: torch.dtype) -> None:
    """(B, S, H, D) in memory, every other head, reversed batches, rows further apart than they are long, and a bias and
    a mask that are transposed or broadcast: the same bits as copies of them give."""
    torch.manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size).to(device, dtype)

    query = randn(2, 37, 4, 24).transpose(1, 2)
    key = randn(2, 4, 53, 40)[:, ::2, :, 8:32]
    value = randn(4, 2, 53, 24)[::2]
    bias = randn(1, 4, 53, 37).mT
    mask = (torch.rand(2, 1, 53, 37) < 0.7).to(device).mT
    mask[..., 0] = True
    grad = randn(2, 37, 4, 24).transpose(1, 2)
    results = []
    for copied in (False, True):
        leaves = [(x.contiguous() if copied else x).detach().requires_grad_() for x in (query, key, value, bias)]
        seen = fastattn.BoolMask(mask.contiguous() if copied else mask)
        results.append(_gradients(backend, leaves, grad, bias=fastattn.DenseBias(leaves[3]), mask=seen))
    _assert_same(*results)


@contextmanager
def _vast(elements: int, dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """A tensor that takes memory only where it is written to, on a CPU: a hole in a file."""
    if device != "cpu":
        yield torch.empty(elements, dtype=dtype, device=device)
        return
    with tempfile.TemporaryFile() as file:
        file.truncate(elements * dtype.itemsize)
        with mmap.mmap(file.fileno(), 0) as mapped:
            vast = torch.frombuffer(mapped, dtype=dtype)
            yield vast
            del vast


def offsets_beyond_32_bits(backend: str, device: str) -> None:
    """Rows, heads and batches of one tensor more than 2**31 elements apart: the same bits as copies give."""
    torch.manual_seed(0)
    rows, keys, dim = 300, 40, 16
    row = 8_000_000  # 256 of them are still less than 2**31, the 300 rows of the queries are not
    far = rows * row + 64
    span = 2 * far
    assert (rows - 1) * row > 2**31
    with _vast(span, torch.float16, device) as vast:
        query = vast.as_strided((2, 1, rows, dim), (far, 1, row, 1), 0)
        key = vast.as_strided((2, 1, keys, dim), (far, 1, row, 1), 16)
        value = vast.as_strided((2, 1, keys, dim), (far, 1, row, 1), 32)
        grad = vast.as_strided((2, 1, rows, dim), (far, 1, row, 1), 48)
        for view in (query, key, value, grad):
            view.copy_(torch.randn(view.shape))
        results = []
        for copied in (False, True):
            leaves = [(x.contiguous() if copied else x).detach().requires_grad_() for x in (query, key, value)]
            upstream = grad.contiguous() if copied else grad
            results.append(_gradients(backend, leaves, upstream, mask=fastattn.Causal(), query_offset=0))
            del leaves, upstream
        del query, key, value, grad, view, vast
    _assert_same(*results)


def same_dropout_as_the_cpu_backend(backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """The same seed drops the same weights; the CPU backend is given the seed that the device drew."""
    query, key = torch.zeros(2, 3, 40, 16, dtype=dtype), torch.zeros(2, 3, 37, 16, dtype=dtype)
    value = torch.eye(37, 64, dtype=dtype).expand(2, 3, 37, 64)  # the output is the weights themselves
    kept = []
    for name, where in ((backend, device), ("cpu", "cpu"), ("reference", "cpu")):
        torch.manual_seed(5)
        operands = [x.to(where) for x in (query, key, value)]
        problem = fastattn.functional.lower(*operands, dropout_p=0.3)
        if name == backend:
            seed = problem.dropout_seed.cpu()
            torch.manual_seed(5)
            out = fastattn.attention(*operands, dropout_p=0.3, backend=name)
        else:
            out, _ = fastattn.dispatch.run(dataclasses.replace(problem, dropout_seed=seed), name)
        kept.append(out[..., :37].cpu() > 0)
    assert 0.6 < kept[0].float().mean() < 0.8
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def the_same_bits_on_every_run(backend: str, device: str, call: Call | SoftmaxCall) -> None:
    runs = [call.fused(backend, device) for _ in range(2)]
    if isinstance(call, Call):
        results = [{"out": r.out, "lse": r.lse, **r.grads} for r in runs]
    else:
        results = [{"out": out, **grads} for out, grads in runs]
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


def rotation_in_place_inside_guard_bands(
    backend: str, device: str, dtype: torch.dtype, interleaved: bool, shape: RotaryShape | None = None
) -> None:
    """The same bits as out of place, and nothing beside the operands is read or written."""
    call = RotaryCall(shape or RotaryShape(dim=24, width=10), dtype, interleaved=interleaved, positions="each")
    expected = call.run(backend, device)
    padded = [torch.nn.functional.pad(x, (3, 5, 2, 1), value=math.nan).to(device) for x in (call.query, call.key)]
    inner = [x[..., 2:-1, 3:-5] for x in padded]
    for ours, want in zip(call.run(backend, device, query=inner[0], key=inner[1]), expected, strict=True):
        assert torch.equal(ours, want)
    found = call.run(backend, device, query=inner[0], key=inner[1], inplace=True)
    for whole, part, ours, want in zip(padded, inner, found, expected, strict=True):
        assert ours.data_ptr() == part.data_ptr() and torch.equal(part, want)
        assert whole.isnan().sum() == whole.numel() - part.numel()


def softmax_inside_guard_bands(backend: str, device: str, shape: Shape) -> None:
    """Nothing beside a slice is read or written, and what the masks hide is not read: it is NaN."""
    call = SoftmaxCall(("window", "alibi"), shape)
    hidden = ~call.visible()
    scores = call.leaves["scores"].masked_fill(hidden, math.nan)
    padded = torch.nn.functional.pad(scores, (3, 5, 2, 1), value=math.nan).to(device)[..., 2:-1, 3:-5]
    grad = torch.nn.functional.pad(call.grad_out.masked_fill(hidden, math.nan), (1, 1, 1, 1), value=math.nan)
    want_out, want = call.fused(backend, device)
    leaf = padded.detach().requires_grad_()
    leaves = {name: x.to(device) for name, x in call.leaves.items()}
    out = fastattn.masked_softmax(leaf, **call.keywords(leaves), backend=backend)
    (dscores,) = torch.autograd.grad(out, leaf, grad.to(device)[..., 1:-1, 1:-1])
    assert torch.equal(out, want_out) and torch.equal(dscores, want["scores"])
